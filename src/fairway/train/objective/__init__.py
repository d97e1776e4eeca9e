"""Slot: what training minimises. Promise: `loss(spec, logits, targets)` gives nats per token, float32 or better."""
