"""What functions are given: sizes, indices and keys as numbers, arrays as their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fairway.audit.trial.arrays import Array, array_of, scalar
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.values import UNKNOWN, Unknown, Value, mixed

Act = Callable[..., Value]


def kept(args: tuple[Value, ...]) -> Value:
    """A function that nobody named here, of losses: losses of the same targets still, where they have the form."""
    losses = [each for each in args if isinstance(each, Array) and each.lossy]
    if len(losses) == 1:
        return losses[0]
    sums = [each for each in args if isinstance(each, Sum)]
    return sums[0] if len(sums) == 1 else mixed(*args)


def sizes_of(shape: tuple[Value, ...]) -> tuple[int, ...]:
    """zeros(2, 3), zeros((2, 3)), view(x.shape)."""
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    numbers = [scalar(each) for each in shape]
    if not all(isinstance(each, (int, np.integer)) for each in numbers):
        raise TypeError
    return tuple(int(each) for each in numbers)


def body_of(array: Value) -> Array:
    found = array_of(array)
    if found is None:
        raise TypeError
    return found


def numbers_of(array: Value) -> Any:
    """Its numbers; TypeError of losses and sums, of which only the targets are known."""
    found = body_of(array)
    if found.num is None or found.num.dtype == object:
        raise TypeError
    return found.num


def key_of(index: Value) -> Value:
    """An index into a list or dict."""
    if isinstance(index, Array):
        return scalar(index)
    if isinstance(index, slice):
        parts = [scalar(part) for part in (index.start, index.stop, index.step)]
        return UNKNOWN if any(isinstance(part, Unknown) for part in parts) else slice(*parts)
    if isinstance(index, tuple):
        return tuple(scalar(part) for part in index)
    return index


def index_of(index: Value) -> Any:
    """An index into an array; UNKNOWN where a part of it is not known."""
    if isinstance(index, tuple):
        parts = [index_of(part) for part in index]
        return UNKNOWN if any(isinstance(part, Unknown) for part in parts) else tuple(parts)
    if isinstance(index, slice):
        return key_of(index)
    if isinstance(index, Array):
        if index.num is None or index.num.dtype == object:
            return UNKNOWN
        return index.num if index.num.ndim else index.num[()]
    if isinstance(index, list):
        return np.asarray(index) if all(isinstance(each, (bool, int)) for each in index) else UNKNOWN
    if index is None or index is Ellipsis or isinstance(index, (bool, int, np.integer)):
        return index
    return UNKNOWN
