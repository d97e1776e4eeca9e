"""Slot: how the scored text is cut into windows. A technique offers `Spec`, `windows(targets, context, spec)`, and
`CARRIED`: whether a window sees the keys and values that those before it left (True), or begins anew (False)."""
