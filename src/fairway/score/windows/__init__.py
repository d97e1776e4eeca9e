"""Slot: how the scored text is cut into windows. A technique offers `Spec` and `windows(targets, context, spec)`."""
