"""What scripts do with rows over the vocabulary: softmax, the largest, what is said of a token, spreading."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fairway.audit.trial.arrays import Array, Numbers, limited, scalar
from fairway.audit.trial.given import body_of, numbers_of
from fairway.audit.trial.reducing import Extremes
from fairway.audit.trial.values import Value


def _floats(array: Value) -> Numbers:
    held = numbers_of(array)
    return held.astype(np.float64) if held.dtype.kind != "f" else held


def _axis(value: Value, kwargs: dict[str, Value], default: int = -1) -> int:
    found = scalar(kwargs.get("dim", kwargs.get("axis", default if value is None else value)))
    if not isinstance(found, int) or isinstance(found, bool):
        raise TypeError
    return found


def logsumexp_of(rows: Numbers, axis: int, keep: bool = False) -> Numbers:
    """log sum exp, with the largest taken off before."""
    top = rows.max(axis=axis, keepdims=True)
    found = top + np.log(np.exp(rows - top).sum(axis=axis, keepdims=True))
    return found if keep else found.squeeze(axis)


def log_softmax(array: Value, dim: Value = None, **kwargs: Value) -> Value:
    rows = _floats(array)
    return Array(rows - logsumexp_of(rows, _axis(dim, kwargs), keep=True))


def softmax(array: Value, dim: Value = None, **kwargs: Value) -> Value:
    found = log_softmax(array, dim, **kwargs)
    return Array(np.exp(found.num))


def logsumexp(array: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
    keep = bool(keepdim or kwargs.get("keepdims", False))
    return Array(logsumexp_of(_floats(array), _axis(dim, kwargs), keep))


def sigmoid(array: Value) -> Value:
    return Array(1.0 / (1.0 + np.exp(-_floats(array))))


def softplus(array: Value, *_: Value, **__: Value) -> Value:
    return Array(np.logaddexp(0.0, _floats(array)))


def relu(array: Value, *_: Value, **__: Value) -> Value:
    return Array(np.maximum(_floats(array), 0.0))


def reciprocal(array: Value) -> Value:
    return Array(1.0 / _floats(array))


def extreme(name: str) -> Callable[..., Value]:
    """x.max(dim): the values and where they are; x.max(): the value."""

    def act(array: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
        rows = numbers_of(array)
        if "axis" in kwargs or isinstance(dim, Array) or (dim is None and "dim" not in kwargs):
            raise NotImplementedError
        axis = _axis(dim, kwargs)
        at = np.expand_dims(getattr(rows, f"arg{name}")(axis=axis), axis)
        values = np.take_along_axis(rows, at, axis)
        keep = bool(keepdim or kwargs.get("keepdims", False))
        return Extremes(Array(each if keep else each.squeeze(axis)) for each in (values, at))

    return act


def topk(array: Value, k: Value, dim: Value = None, **kwargs: Value) -> Value:
    rows, many, axis = numbers_of(array), scalar(k), _axis(dim, kwargs)
    order = np.argsort(-rows if kwargs.get("largest", True) else rows, axis=axis, kind="stable")
    at = np.take(order, np.arange(many), axis=axis)
    return Extremes((Array(np.take_along_axis(rows, at, axis)), Array(at)))


def one_hot(array: Value, num_classes: Value = -1, **_: Value) -> Value:
    ids, many = numbers_of(array), scalar(num_classes)
    limited(float(ids.size) * many)
    return Array((ids[..., None] == np.arange(many)).astype(np.int64))


def lerp(array: Value, end: Value, weight: Value) -> Value:
    begin, other, share = _floats(array), _floats(end), numbers_of(weight)
    return Array(begin + share * (other - begin))


def scatter_(array: Value, dim: Value, index: Value, src: Value = None, **kwargs: Value) -> Value:
    """x.scatter_(dim, index, src or value): in place."""
    held, at = body_of(array), numbers_of(index)
    more = kwargs.get("value", src)
    add = kwargs.get("reduce") == "add"
    return _spread(held, scalar(dim), at, more, np.add if add else None)


def scatter_add_(array: Value, dim: Value, index: Value, src: Value = None, **_: Value) -> Value:
    return _spread(body_of(array), scalar(dim), numbers_of(index), src, np.add)


def scatter_reduce_(
    array: Value, dim: Value, index: Value, src: Value = None, reduce: Value = "sum", include_self: Value = True
) -> Value:
    """x.scatter_reduce_(dim, index, src, "amax"): in place, with what stood there or without it."""
    held, at, how = body_of(array), numbers_of(index), _REDUCED[str(reduce)]
    if include_self is False:  # the largest of them is one of them
        _spread(held, scalar(dim), at, _NOTHING.get(str(reduce), src), None)
    return _spread(held, scalar(dim), at, src, how)


def scatter(array: Value, *args: Value, **kwargs: Value) -> Value:
    return scatter_(body_of(array).all(np.array), *args, **kwargs)


def scatter_add(array: Value, *args: Value, **kwargs: Value) -> Value:
    return scatter_add_(body_of(array).all(np.array), *args, **kwargs)


def scatter_reduce(array: Value, *args: Value, **kwargs: Value) -> Value:
    return scatter_reduce_(body_of(array).all(np.array), *args, **kwargs)


_NOTHING: dict[str, Value] = {"sum": 0, "prod": 1}
_REDUCED: dict[str, np.ufunc] = {"sum": np.add, "prod": np.multiply, "amax": np.maximum, "amin": np.minimum}


def _spread(held: Array, dim: int, at: Numbers, more: Value, how: np.ufunc | None) -> Array:
    assert held.num is not None
    values = np.broadcast_to(numbers_of(more), at.shape)
    places: list[Numbers] = list(np.indices(at.shape))
    places[dim % held.num.ndim] = at
    if how is not None:
        how.at(held.num, tuple(places), values)
    else:
        held.num[tuple(places)] = values
    return held


def gather(array: Value, *args: Value, **kwargs: Value) -> Array:
    """x.gather(dim, index), np.take_along_axis(x, index, axis): of tokens, what is said of each; those at places."""
    given = [*args, *kwargs.values()]
    index = next(each for each in given if isinstance(each, Array))
    dim = next((each for each in given if isinstance(each, int)), -1)
    held, at = body_of(array), body_of(index)
    if held.num is None or at.num is None:
        raise TypeError
    found = Array(np.take_along_axis(held.num, at.num, dim))
    found.net = held.net
    if held.num.dtype.kind == "f":
        priced(found, at.pos)
    elif held.pos is not None:
        found.pos = np.take_along_axis(np.broadcast_to(held.pos, held.shape), at.num, dim)
    return found


def priced(array: Array, places: Numbers | None) -> Array:
    """Numbers as what is said of the targets at these places."""
    fits = places is not None and (places.shape == array.shape or not places.ndim)
    if places is not None and fits and bool((places >= 0).any()):
        array.pos, array.price = np.broadcast_to(places, array.shape), array.num
    return array


ROWS: dict[str, Callable[..., Value]] = {
    "log_softmax": log_softmax,
    "softmax": softmax,
    "logsumexp": logsumexp,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "relu": relu,
    "reciprocal": reciprocal,
    "max": extreme("max"),
    "min": extreme("min"),
    "topk": topk,
    "one_hot": one_hot,
    "lerp": lerp,
    **dict.fromkeys(["gather", "take_along_dim", "take_along_axis"], gather),
    "scatter_": scatter_,
    "scatter": scatter,
    "scatter_add_": scatter_add_,
    "scatter_add": scatter_add,
    "scatter_reduce_": scatter_reduce_,
    "scatter_reduce": scatter_reduce,
}


__all__ = ["ROWS", "gather", "log_softmax", "priced"]
