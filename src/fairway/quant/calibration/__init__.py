"""Slot: where Hessians come from.

A source is a module with a frozen `Spec` and

    observer(quant, model, names, run) -> what looks on while training (train.Observer, and `finish()`;
        `foresee(scales)` where the rates of all steps are known beforehand), or None
    hessians(quant, model, names, windows, run, seed) -> Hessians
    ON_CLOCK: whether `hessians` reads training text, and so belongs to the training clock

`observer` is asked before training: it raises RecipeError for what would fail after it. names: the matrices that are
asked for (`quant.observed`); windows: (B, T) int64 batches of training text, this rank's share.

Promise: symmetric and positive semidefinite, of every matrix asked for; nothing, and nothing read or written, where
none is; the same again from the same seed, and by any number of ranks that see the same text.
"""
