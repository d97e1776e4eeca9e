"""Two arrays and an operator: numbers with numbers, losses with what weighs them, losses with losses of one target."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from fairway.audit.trial.arrays import Array, Numbers, array_of, holds_sums, limited
from fairway.audit.trial.sums import PLACE
from fairway.audit.trial.values import NET, UNKNOWN, Unknown, Value, mixed

_FEW = 1 << 20  # multiplications
_FOLLOWING = 0.8  # of the steps from target to target: where a row ends they go back

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mult": operator.mul,
    "Div": operator.truediv,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "MatMult": operator.matmul,
    "Pow": operator.pow,
    "BitAnd": operator.and_,
    "BitOr": operator.or_,
    "BitXor": operator.xor,
    "LShift": operator.lshift,
    "RShift": operator.rshift,
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
}
COMPARISONS = ("Eq", "NotEq", "Lt", "LtE", "Gt", "GtE")


def binary(name: str, left: Value, right: Value) -> Value:
    """left `name` right where one of them is an Array."""
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        held = left if isinstance(left, Array) else right
        if name == "Div" and isinstance(left, Unknown) and left.net and _is_column(held):
            return left  # rows, each by what it sums to: p.scatter(1, hint, q * w) / (1 - q + q * w)
        if isinstance(held, Array) and (held.lossy or held.net or holds_sums(held)) and name not in COMPARISONS:
            return _share_of(held) if held.lossy and name == "Mult" else held
        return mixed(left, right)
    one, two = array_of(left), array_of(right)
    if one is None or two is None:
        return UNKNOWN
    if one.lossy or two.lossy:
        return NET if name in COMPARISONS else _of_losses(name, one, two)
    assert one.num is not None
    assert two.num is not None
    if (holds_sums(one) or holds_sums(two)) and name in COMPARISONS:
        return NET
    if name == "MatMult":
        return _product(one, two)
    if one.net != two.net and _of_other_width(one, two):
        return one if one.net else two
    if one.shape != two.shape and one.shape and two.shape:
        limited(float(np.prod(np.broadcast_shapes(one.shape, two.shape))))
    with np.errstate(all="ignore"):
        made = Array(np.asarray(OPERATORS[name](one.num, two.num))).as_picked(one, two)
    if name not in COMPARISONS:
        made.net = one.net or two.net
        _price(made, name, one, two)
    return made


def _is_column(value: Value) -> bool:
    """Losses, one for each row."""
    return isinstance(value, Array) and value.lossy and len(value.shape) > 1 and value.shape[-1] == 1


def _product(one: Array, two: Array) -> Value:
    """one @ two, of few numbers: those of a gate, and no layer of a model."""
    assert one.num is not None
    assert two.num is not None
    small = one.num.size * (two.shape[-1] if len(two.shape) > 1 else 1) <= _FEW
    if one.net or two.net or holds_sums(one) or holds_sums(two) or not small:
        return mixed(one, two)
    return Array(np.asarray(one.num @ two.num))


def _of_other_width(one: Array, two: Array) -> bool:
    """Whether their rows do not fit: a vector that is added to a hidden state, for which the logits stand that a model
    makes of it."""
    widths = {each.shape[-1] for each in (one, two) if each.shape}
    return len(widths - {1}) > 1


def _price(made: Array, name: str, one: Array, two: Array) -> None:
    """What an operator leaves of prices: a constant factor is a unit, what is masked has none."""
    held, other = (one, two) if one.price is not None else (two, one)
    if other.price is not None and held.pos is not None and other.pos is not None:
        hints = _of_hints(held.pos, other.pos)
        if _earlier(held.pos, other.pos) if hints is None else hints:
            held, other = other, held
    if held.price is None or held.pos is None or made.shape != held.shape:
        return
    assert made.num is not None
    assert other.num is not None
    made.pos, made.price = held.pos, made.num
    if name in ("Mult", "Div") and other.price is None:
        switch = other.num.dtype == bool or bool(np.isin(other.num, (0, 1)).all())
        if switch and name == "Mult":
            made.pos, made.price = np.where(other.num != 0, held.pos, -1), held.price
        elif other.body.size == 1:
            made.price = -held.price if other.num.reshape(-1)[0] < 0 else held.price


def _of_losses(name: str, one: Array, two: Array) -> Value:
    """Losses with losses of the same targets, or with numbers: weights are multiplied, whatever else keeps them."""
    if one.lossy and two.lossy:
        taken_back = _taken_back(one, two) if name == "Sub" else None
        return taken_back or merged(one, two, add=name in ("Add", "Sub"))
    loss, plain = (one, two) if one.lossy else (two, one)
    assert loss.pos is not None
    assert loss.coef is not None
    assert plain.num is not None
    if holds_sums(plain):
        return UNKNOWN
    shape = np.broadcast_shapes(loss.shape, plain.shape)
    limited(float(np.prod(shape)))
    pos = np.broadcast_to(loss.pos, shape)
    coef = np.broadcast_to(loss.coef, shape)
    if name == "Mult":
        coef = coef * plain.num
    elif name == "Div" and loss is one:
        with np.errstate(all="ignore"):
            coef = np.where(plain.num == 0, 0.0, coef / plain.num)
    made = Array(None, pos, coef).as_picked(loss)
    made.was = loss.was if shape == loss.shape else ()
    divides = name != "Mult" and loss is two
    less = _of_losses(name, loss.less, plain) if loss.less is not None and not divides else None
    made.less = less if isinstance(less, Array) else None
    return made


def _taken_back(one: Array, two: Array) -> Array | None:
    """Losses after a step without those before it, of the same targets. None where they are of others, or alike."""
    assert one.pos is not None
    assert two.pos is not None
    if one.shape != two.shape or one.less is not None or two.less is not None:
        return None
    alike = one.pos == two.pos
    if alike.all() or ((one.pos ^ two.pos) & PLACE)[(one.pos >= 0) | (two.pos >= 0)].any():
        return None
    made = Array(None, one.pos, one.coef).as_picked(one)
    made.less = two
    return made


def merged(one: Array, two: Array, add: bool) -> Value:
    """Two arrays of losses as one of both: added, or mixed into one loss of each target."""
    assert one.pos is not None
    assert two.pos is not None
    assert one.coef is not None
    assert two.coef is not None
    a, b = one.pos, two.pos
    both = (a >= 0) & (b >= 0)
    if np.any(both & (a & PLACE != b & PLACE) & (one.coef != 0) & (two.coef != 0)):
        hints = _of_hints(a, b)
        return NET if hints is None else two if hints else one
    shares = one.net and two.net  # (1 - share) * p + share * q
    coef = one.coef + two.coef if add and not shares else np.maximum(np.abs(one.coef), np.abs(two.coef))
    return Array(None, np.where(both, a | b, np.maximum(a, b)), coef)


def _share_of(losses: Array) -> Array:
    """They, multiplied by what nobody knows."""
    made = losses.all(lambda body: body)
    made.was, made.net = losses.was, True
    return made


def _of_hints(one: Numbers, other: Numbers) -> bool | None:
    """Of two arrays of places: whether the first is of hints and the second of targets. None where nobody can tell."""
    for told in (_everywhere, _one_by_one):
        first, second = told(one), told(other)
        if first != second:
            return second
    return None


def _earlier(one: Numbers, other: Numbers) -> bool:
    """Whether the first are places before the second: a hint comes out of what was met before."""
    both = (one >= 0) & (other >= 0) if one.shape == other.shape else np.zeros(one.shape, dtype=bool)
    return bool((one[both] <= other[both]).all()) and bool((one[both] < other[both]).any())


def _everywhere(pos: Numbers) -> bool:
    """Whether each loss has a target: not every place has a hint."""
    return bool(np.all(pos >= 0))


def _one_by_one(pos: Numbers) -> bool:
    """Whether the targets follow one another, as those of a text do, and hints do not. Padding is between."""
    flat = pos.reshape(-1)
    both = (flat[1:] >= 0) & (flat[:-1] >= 0)
    return bool((np.diff(flat & PLACE)[both] == 1).mean() > _FOLLOWING) if both.any() else False


__all__ = ["COMPARISONS", "OPERATORS", "binary", "merged"]
