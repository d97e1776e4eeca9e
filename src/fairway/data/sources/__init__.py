"""Slot: where text comes from. A source is a `Spec` and `load(spec, path) -> Parts`, training and held-out apart."""
