"""Slot: what is done to the token embedding before the stack. Promise: causal, one token of memory, float64-clean."""
