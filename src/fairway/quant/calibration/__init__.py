"""Slot: where Hessians come from. Promise: symmetric, positive semidefinite, of every matrix asked for; the same again
from the same seed, and by any number of ranks that see the same text.

A source has `observer(quant, model, names, run)`, asked before training: RecipeError for what would fail after it, and
what looks on (train.Observer) where Hessians are gathered then; `hessians(quant, model, names, windows, run, seed)`,
asked of the trained model; and READS_TEXT: whether that reads training text, and so belongs to the training clock.
"""
