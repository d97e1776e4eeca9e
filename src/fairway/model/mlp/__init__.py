"""Slot: the feed-forward part of a block. Promise: position-wise, deterministic, float64-clean."""
