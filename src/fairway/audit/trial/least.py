"""The least of several sums of losses: which one is kept nobody knows, that one is chosen is a fact."""

from __future__ import annotations

import numpy as np

from fairway.audit.trial.arrays import Array, holds_sums, scalar
from fairway.audit.trial.core import Core
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.told import Picked
from fairway.audit.trial.values import Value


def sum_in(key: Value) -> Sum | None:
    """The sum of losses that something is compared by: itself, or the first of a tuple."""
    first = scalar(key[0]) if isinstance(key, tuple) and key else key
    return first if isinstance(first, Sum) else None


def several_sums(array: Array) -> list[Sum]:
    """Those that an array holds and nothing else, if it holds several."""
    held = list(array.num.flat) if array.num is not None and array.num.dtype == object else []
    return held if len(held) > 1 and all(isinstance(each, Sum) for each in held) else []


def least(machine: Core, given: list[Value], compared: list[Sum], line: int) -> Value:
    """The first of them stands for the one that is chosen; the sums in it are told from those that were compared."""
    kept: list[Sum] = []
    chosen = _told_apart(given[0], kept)
    machine.trial.picked.append(Picked(line, tuple(kept), tuple(compared)))
    return chosen


def _told_apart(value: Value, kept: list[Sum]) -> Value:
    """A copy whose sums are others, and put in a list."""
    if isinstance(value, Sum):
        kept.append(value.scaled(1.0))
        return kept[-1]
    if type(value) in (tuple, list):
        return type(value)(_told_apart(each, kept) for each in value)
    if type(value) is dict:
        return {name: _told_apart(each, kept) for name, each in value.items()}
    if isinstance(value, Array) and holds_sums(value) and value.num is not None:
        sums = np.empty(value.num.size, dtype=object)
        sums[:] = [_told_apart(each, kept) for each in value.num.flat]
        return Array(sums.reshape(value.num.shape))
    return value


__all__ = ["least", "several_sums", "sum_in"]
