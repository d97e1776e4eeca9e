"""Slot: what queries, keys and values become. Promise: causal, deterministic, batch-invariant, float64-clean."""
