"""Slot: what training minimises.

Promise: `loss(spec, logits, targets)` gives for each token nats, weighted or not, in float32 or better. It is the
curve's `loss`: a code length only where the technique is cross-entropy.
"""
