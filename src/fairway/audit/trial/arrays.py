"""Arrays: numbers, the places that token ids have in the text, or losses with the targets that they are of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairway.audit.trial.ids import Id, ids_of
from fairway.audit.trial.sums import LEAST, PLACE, Rows, Sum
from fairway.audit.trial.values import NET, UNKNOWN, Obj, States, Unknown, Value

LARGEST = 3_000_000  # elements: what is larger is a table of counts or of weights, and not known

largest: ContextVar[int] = ContextVar("largest", default=LARGEST)
"""The same for the trial under way."""

Numbers = NDArray[Any]


class Array:
    """A tensor or array. One of:

    numbers: `num`, of any shape; `pos`, of the same shape or None: the place in the text of each token id, -1 for none
    losses: `num` is None; `pos` as above, `coef` how much each counts
    sums: `num` of dtype object, of Sums
    Slices are views of all of these, as in torch and numpy. was: the shape before it was made flat, for a model that
    gives its losses the shape of logits that nobody knows. Where a trial works with a made-up model (audit/weighing),
    net: numbers that a model made, before they are a distribution; or losses of which a share is taken that nobody
    knows; price: what is said of the target of each place, as a number, before it is multiplied by a constant. whole:
    of a part, the array and the place that it was taken from: numbers that become sums are no view any more. less: of
    losses, what is taken from them of the same targets, as they were before a step: `again - before`. rows: of what a
    mask picked out of a table, how many each of its rows gave, and of what that was an index for.
    """

    __slots__ = ("coef", "less", "net", "num", "pos", "price", "rows", "was", "whole")

    def __init__(self, num: Numbers | None, pos: Numbers | None = None, coef: Numbers | None = None) -> None:
        self.num = num
        self.pos = pos
        self.coef = coef
        self.was: tuple[int, ...] = ()
        self.less: Array | None = None
        self.whole: tuple[Array, Any] | None = None
        self.net = False
        self.price: Numbers | None = None
        self.rows: Numbers | None = None

    @property
    def body(self) -> Numbers:
        """The array that has the shape."""
        if self.num is not None:
            return self.num
        assert self.pos is not None
        return self.pos

    @property
    def shape(self) -> tuple[int, ...]:
        return self.body.shape

    @property
    def lossy(self) -> bool:
        return self.coef is not None

    def all(self, turn: Callable[[Numbers], Numbers]) -> Array:
        """The same change of shape for all that it holds."""
        made = Array(*(None if each is None else turn(each) for each in (self.num, self.pos, self.coef)))
        made.net = self.net
        made.less = self.less.all(turn) if self.less is not None else None
        if self.price is not None:
            made.price = turn(self.price)
        return made.as_picked(self)

    def as_picked(self, *others: Array) -> Array:
        """With the rows of what it was made of, where it has its shape."""
        for other in others:
            if other.rows is not None and other.shape == self.shape:
                self.rows = other.rows
        return self

    def __len__(self) -> int:
        return len(self.body)

    def __repr__(self) -> str:
        return f"Array{self.shape}{'of losses' if self.lossy else ''}"


class TooLarge(ValueError):
    """An array, a text, a number of a size that a trial does not hold."""


def limited(count: float) -> None:
    """TooLarge beyond LARGEST elements."""
    if count > largest.get():
        raise TooLarge


def array_of(value: Value) -> Array | None:
    """A number, list or array as an Array; None for what is none."""
    if isinstance(value, Array):
        return value
    if isinstance(value, Sum):
        return Array(_objects([value]).reshape(()))
    if isinstance(value, Id):
        return Array(np.asarray(int(value)), np.asarray(value.place, np.int32))
    if isinstance(value, (bool, int, float, np.number)):
        return Array(np.asarray(value))
    if isinstance(value, (list, tuple, range)):
        return _listed(list(value))
    if _named_tuple(value):
        return _listed(list(value.vars.values()))
    return None


def _named_tuple(value: Value) -> bool:
    return isinstance(value, Obj) and value.kind.made == "tuple"


def _listed(items: list[Value]) -> Array | None:
    if any(isinstance(item, (Array, list, tuple)) or _named_tuple(item) for item in items):
        parts = [array_of(item) for item in items]
        return (
            stacked([part for part in parts if part is not None]) if all(part is not None for part in parts) else None
        )
    if any(isinstance(item, Sum) for item in items):
        return Array(_objects(items))
    if not all(isinstance(item, (bool, int, float, np.number)) for item in items):
        return None
    if any(isinstance(item, Id) for item in items):
        places = [item.place if isinstance(item, Id) else -1 for item in items]
        return Array(np.asarray([*map(int, items)]), np.asarray(places, np.int32))
    return Array(np.asarray(items))


def _objects(items: list[Value]) -> Numbers:
    made = np.empty(len(items), dtype=object)
    made[:] = items
    return made


def stacked(parts: list[Array], axis: int | None = None) -> Array | None:
    """torch.stack (axis None or the new one) of arrays of one shape."""
    if not parts or len({part.shape for part in parts}) > 1:
        return None
    return joined([part.all(lambda body: np.expand_dims(body, axis or 0)) for part in parts], axis or 0)


def joined(parts: list[Array], axis: int = 0) -> Array:
    """torch.cat."""
    limited(sum(part.body.size for part in parts))
    if any(part.lossy for part in parts):
        full = [as_losses(part) for part in parts]
        return Array(
            None,
            np.concatenate([part.pos for part in full], axis),
            np.concatenate([part.coef for part in full], axis),
        )
    num = np.concatenate([part.body for part in parts], axis)
    if all(part.pos is None for part in parts):
        return Array(num)
    return Array(num, np.concatenate([places(part) for part in parts], axis))


def places(array: Array) -> Numbers:
    """The places of an array's tokens, made where it has none, and its own where it shares them."""
    if array.pos is None:
        array.pos = np.full(array.shape, -1, dtype=np.int32)
    array.pos = _own(array.pos)
    return array.pos


def _own(numbers: NDArray[Any]) -> NDArray[Any]:
    """The same numbers, to be written to: what was broadcast is a copy then."""
    return numbers if numbers.flags.writeable else numbers.copy()


def as_losses(array: Array) -> Array:
    """An array of numbers as one of losses of nothing."""
    if array.coef is None:
        return Array(None, np.full(array.shape, -1, np.int32), np.zeros(array.shape))
    return array


def turn_into_losses(array: Array) -> None:
    """In place: zeros that losses are about to be written to."""
    array.pos = np.full(array.shape, -1, np.int32)
    array.coef = np.zeros(array.shape)
    array.num = None


def holds_sums(array: Array) -> bool:
    """Whether its elements are Sums."""
    return array.num is not None and array.num.dtype == object


def summed(array: Array, axis: Any = None, keep: bool = False) -> Value:
    """sum(): of losses a Sum, or an array of them along an axis."""
    if array.lossy:
        if axis is None:
            return sum_of(array)
        return _along(array, axis, keep)
    assert array.num is not None
    if holds_sums(array) and axis is None:
        total: Any = 0.0
        for each in array.num.ravel():
            total = total + each
        return total
    return Array(np.asarray(array.num.sum(axis=axis, keepdims=keep)))


def sum_of(array: Array) -> Sum:
    """The Sum of all losses of an array. Where all of the text's weigh nought, it says of which tokens they are."""
    if array.less is not None:
        return sum_of(Array(None, array.pos, array.coef)) - sum_of(array.less)
    assert array.pos is not None
    assert array.coef is not None
    if array.pos.size == 1 and array.rows is None and (place := int(array.pos.item())) >= 0:  # token by token
        own = np.array([place], np.int32)
        row = Rows(own & PLACE, np.ones(1, np.int64))
        return Sum(own, np.array([array.coef.item()], np.float64), rows=row)
    inside = array.pos >= 0
    counted = inside & (array.coef != 0)
    counted = counted if counted.any() else inside
    places, weights = array.pos[counted].astype(np.int32), array.coef[counted].astype(np.float64)
    return Sum(places, weights, rows=_rows(array, counted), size=array.pos.size)


def _rows(array: Array, counted: NDArray[np.bool_]) -> Rows | None:
    """The windows of an array of losses; None where it is flat and more than one stretch of the text."""
    assert array.pos is not None
    width = array.shape[-1] if array.body.ndim > 1 else array.was[-1] if len(array.was) > 1 else 0
    if width >= LEAST and not array.pos.size % width:
        return Rows(array.pos.reshape(-1, width)[:, 0] & PLACE, counted.reshape(-1, width).sum(axis=1))
    flat = array.pos.reshape(-1)
    if array.rows is not None and int(array.rows.sum()) == flat.size:
        ends = np.cumsum(array.rows)
        starts = [flat[low] & PLACE if low < high else PLACE for low, high in zip(ends - array.rows, ends, strict=True)]
        of_row = np.repeat(np.arange(array.rows.size), array.rows)[counted.reshape(-1)]
        return Rows(np.array(starts, np.int32), np.bincount(of_row, minlength=array.rows.size))
    inside = flat[flat >= 0] & PLACE
    if not inside.size:
        return None
    if int(inside[-1]) - int(inside[0]) != inside.size - 1:  # backwards, or with places that weigh nought
        return _stretches(flat[counted.reshape(-1)] & PLACE)
    return Rows(inside[:1], np.array([counted.sum()]))


def _stretches(places: NDArray[np.int32]) -> Rows | None:
    """Where the text goes on token by token, or by every eighth, one window after another; in any order, where that is
    all one stretch."""
    ordered = np.sort(places)
    apart = ordered[1:] - ordered[:-1]
    least, most = (int(apart.min()), int(apart.max())) if apart.size else (1, 1)
    if places.size and least == most and (least == 1 or (least and places.size >= LEAST)):
        return Rows(np.array([places.min()], places.dtype), np.array([places.size]))
    if places.size < LEAST:
        return None
    steps = places[1:] - places[:-1]
    begins = np.concatenate(([0], np.flatnonzero(steps != _median(steps)) + 1))
    if begins.size * LEAST > places.size:
        return None
    return Rows(places[begins], np.diff(begins, append=places.size))


def _median(steps: NDArray[np.int32]) -> float:
    """numpy's own takes 8 µs for sixty numbers, a sort 0.8."""
    ordered, half = np.sort(steps), steps.size // 2
    return float(ordered[half]) if steps.size % 2 else (float(ordered[half - 1]) + float(ordered[half])) / 2


def _along(array: Array, axis: Any, keep: bool) -> Array:
    axes = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(each % array.body.ndim for each in axes)
    kept = [n for n in range(array.body.ndim) if n not in axes]
    order = [*kept, *axes]
    shape = tuple(array.shape[n] for n in kept)
    turned = array.all(lambda body: body.transpose(order).reshape(*shape, -1))
    rows = int(np.prod(shape, dtype=np.int64))
    limited(rows * 50)
    flat = turned.all(lambda body: body.reshape(rows, -1))
    sums = _objects([sum_of(flat.all(lambda body, n=n: body[n])) for n in range(rows)])  # type: ignore[misc]
    made = sums.reshape(shape)
    return Array(np.expand_dims(made, axes) if keep else made)


def taken(array: Array, index: Any) -> Value:
    """array[index]; an element comes out as an Array without dimensions."""
    return array.all(lambda body: np.asarray(body[index]) if not _scalar(body, index) else _one(body, index))


def _scalar(body: Numbers, index: Any) -> bool:
    return body.dtype == object


def _one(body: Numbers, index: Any) -> Numbers:
    """An element of an array of objects, which numpy would unpack."""
    found = body[index]
    if isinstance(found, np.ndarray):
        return found
    made = np.empty((), dtype=object)
    made[()] = found
    return made


def put(array: Array, index: Any, value: Value) -> None:
    """array[index] = value, in place."""
    if isinstance(value, Unknown):
        return  # a row of unknown numbers: what stood there is as good
    other = array_of(value)
    if other is None:
        return
    if other.lossy and not array.lossy:
        turn_into_losses(array)
    if array.lossy:
        other = as_losses(other) if not other.lossy else other
        assert array.pos is not None
        assert array.coef is not None
        assert other.pos is not None
        assert other.coef is not None
        array.pos, array.coef = _own(array.pos), _own(array.coef)
        array.pos[index] = other.pos
        array.coef[index] = other.coef
        return
    assert array.num is not None
    assert other.num is not None
    if other.num.dtype == object and array.num.dtype != object:
        array.num = array.num.astype(object)
    array.num = _own(array.num)
    array.num[index] = other.num[()]  # of no dimension: its element, not an array within an array
    if other.price is not None and array.price is None:
        array.price = np.array(array.num)
    if array.price is not None:
        array.price[index] = other.num if other.price is None else other.price
    if other.pos is not None:
        places(array)[index] = other.pos
    elif array.pos is not None:
        places(array)[index] = -1


def scalar(value: Value) -> Value:
    """.item(), float(): a number, a Sum, or UNKNOWN."""
    if not isinstance(value, Array):
        return value
    if value.body.size != 1:
        return UNKNOWN
    if value.lossy:
        return sum_of(value)
    assert value.num is not None
    if value.pos is not None and value.num.dtype.kind in "iu":
        return ids_of(value.num.reshape(-1)[0], value.pos.reshape(-1)[0])
    found = value.num.reshape(-1)[0]
    return found.item() if isinstance(found, np.generic) else found


def states_of(given: Iterable[Value]) -> Unknown:
    """What a model makes of these: of rows of tokens, as many rows."""
    rows = [each for each in given if isinstance(each, Array) and each.pos is not None]
    return States(rows[0].shape) if len(rows) == 1 and len(rows[0].shape) == 2 else NET


__all__ = [
    "Array",
    "array_of",
    "as_losses",
    "holds_sums",
    "joined",
    "limited",
    "places",
    "put",
    "scalar",
    "stacked",
    "states_of",
    "sum_of",
    "summed",
    "taken",
    "turn_into_losses",
]
