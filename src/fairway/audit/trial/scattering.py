"""What is added to, or put in, places of an array that an index names: sums by document, counts by token."""

from __future__ import annotations

import numpy as np

from fairway.audit.trial.arrays import Array, holds_sums, put, sum_of, turn_into_losses
from fairway.audit.trial.binary import merged
from fairway.audit.trial.given import body_of, index_of, numbers_of
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.values import UNKNOWN, Unknown, Value


def index_add_(array: Value, dim: Value, index: Value, source: Value = None, **_: Value) -> Value:
    """x.index_add_(0, index, source): of losses in one dimension, or of numbers."""
    at = numbers_of(index)
    if isinstance(source, Unknown) or not isinstance(array, Array):
        return array
    more = body_of(source)
    if array.body.ndim == 1 and (more.lossy or holds_sums(more)):
        _added(array, at, more)
    elif array.num is not None and more.num is not None:
        np.add.at(array.num, (*[slice(None)] * (dim % array.num.ndim), at), more.num)
    return array


def scatter_add_(array: Value, dim: Value, index: Value, src: Value = None, **_: Value) -> Value:
    """x.scatter_add_(0, index, src), in one dimension; of more, numbers as they stood."""
    return index_add_(array, dim, index, src) if isinstance(array, Array) and array.body.ndim == 1 else array


def scatter_reduce(
    array: Value, dim: Value, index: Value, src: Value, reduce: Value, include_self: Value = True, **_: Value
) -> Value:
    """x.scatter_reduce(dim, index, src, reduce="amin"), of numbers: a copy. The least or the largest of losses in one
    dimension is one of the same target's, whichever that is; what else is made of losses nobody knows."""
    chosen = reduce in ("amin", "amax")
    if chosen and isinstance(array, Array) and isinstance(src, Array) and src.lossy and array.body.ndim == 1:
        made = Array(*(None if each is None else each.copy() for each in (array.num, array.pos, array.coef)))
        at = numbers_of(index)
        before = made.all(lambda body: body[at])
        put(made, at, merged(before, src, add=False) if before.lossy else src)
        return made
    if any(isinstance(each, Array) and each.lossy for each in (array, src)):
        return UNKNOWN
    held, at, more = numbers_of(array).copy(), numbers_of(index), numbers_of(src)
    how = _REDUCED.get(reduce) if isinstance(reduce, str) and include_self is True else None
    if how is None:
        return UNKNOWN
    places = list(np.indices(at.shape))
    places[dim % held.ndim] = at
    how.at(held, tuple(places), more[tuple(map(slice, at.shape))])
    return Array(held)


_REDUCED: dict[str, np.ufunc] = {"amin": np.minimum, "amax": np.maximum, "sum": np.add}


def index_put_(array: Value, index: Value, values: Value, accumulate: Value = False, **_: Value) -> Value:
    """x.index_put_((i, j), values): put, or added."""
    at = index_of(tuple(index) if isinstance(index, list) else index)
    if not isinstance(array, Array) or isinstance(at, Unknown) or isinstance(values, Unknown):
        return array
    if accumulate and array.num is not None:
        np.add.at(array.num, at, numbers_of(values))
    elif not accumulate:
        put(array, at, values)
    return array


def bucketize(array: Value, boundaries: Value, right: Value = False, **_: Value) -> Value:
    """torch.bucketize(x, boundaries): the sides are numpy's, named the other way round."""
    return Array(np.searchsorted(numbers_of(boundaries), numbers_of(array), "right" if right is True else "left"))


def _added(array: Array, index: np.ndarray, more: Array) -> None:
    """In place, to an array of numbers that becomes one of sums, or one of losses: each place has those of a target."""
    assert array.num is not None
    if more.lossy and _of_one_target_each(array, index, more):
        return
    held = array.num.astype(object)
    parts = more.body.reshape(-1)
    flat = more.all(lambda body: body.reshape(-1))
    for each in np.unique(index):
        chosen = np.flatnonzero(np.broadcast_to(index, parts.shape) == each)
        here = flat.all(lambda body, chosen=chosen: body[chosen])  # type: ignore[misc]
        total: Sum | float = sum_of(here) if here.lossy else sum((one for one in here.body), 0.0)
        held[each] = held[each] + total
    array.num = held


def _of_one_target_each(array: Array, index: np.ndarray, more: Array) -> bool:
    """Adds up the parts of each target's loss, byte by byte, where there are noughts; nothing where a place has losses
    of several targets, or several places those of one."""
    assert more.pos is not None
    assert more.coef is not None
    assert array.num is not None
    if index.shape != more.pos.shape or array.num.dtype == object or array.num.any():
        return False
    at, pos = index.reshape(-1), more.pos.reshape(-1)
    pairs = np.unique(np.stack([at, pos]), axis=1)
    owners, targets = pairs
    if len(np.unique(owners)) < len(owners) or len(np.unique(targets)) < len(targets) or (targets < 0).any():
        return False
    turn_into_losses(array)
    assert array.pos is not None
    assert array.coef is not None
    array.pos[owners] = targets
    np.add.at(array.coef, at, more.coef.reshape(-1))
    return True


__all__ = ["bucketize", "index_add_", "index_put_", "scatter_add_", "scatter_reduce"]
