"""Slot: what a model learns from text that is already paid for. A technique offers `Spec` (with `chunk`: targets
between two updates, 0 for none) and `Adapter(model, spec, chunks, ranks)`, a fairway.score.predictor.Adapter."""
