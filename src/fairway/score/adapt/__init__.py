"""Slot: what a model learns from text that is already paid for. A technique offers `Spec` (with `chunk`) and
`Adapter(model, spec, chunks, ranks)` with `learn(unit, tape)`."""
