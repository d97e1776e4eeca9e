"""Operators on the trial's values: Python's own, bounded; sums and arrays by their own rules; else unknown."""

from __future__ import annotations

import ast
import operator
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from fairway.audit.trial.arrays import Array, TooLarge, limited
from fairway.audit.trial.binary import COMPARISONS, OPERATORS, binary
from fairway.audit.trial.files import Path
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.values import Lib, Obj, Raised, Spent, Unknown, Value, mixed

PLAIN: tuple[type, ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    dict,
    set,
    frozenset,
    range,
    deque,
    slice,
)
PLAIN += (type(None), np.number, type({}.keys()), type({}.values()), type({}.items()))

_NUMBERS = {int, float, bool}
_QUICK = {name: OPERATORS[name] for name in (*COMPARISONS, "Add", "Sub")}  # what neither fails nor grows
_UNARY: dict[str, Callable[[Any], Any]] = {"USub": operator.neg, "UAdd": operator.pos, "Invert": operator.invert}
DUNDERS = {
    "Add": "add",
    "Sub": "sub",
    "Mult": "mul",
    "Div": "truediv",
    "FloorDiv": "floordiv",
    "Mod": "mod",
    "BitOr": "or",
    "BitAnd": "and",
    "Eq": "eq",
    "NotEq": "ne",
    "Lt": "lt",
    "LtE": "le",
    "Gt": "gt",
    "GtE": "ge",
}


def combine(name: str, left: Value, right: Value) -> Value:
    """left `name` right, for the name of an ast operator, comparisons included."""
    if type(left) in _NUMBERS and type(right) in _NUMBERS and name in _QUICK:
        return _QUICK[name](left, right)
    for one, sign in ((left, "__{}__"), (right, "__r{}__")):
        if isinstance(one, Obj) and name in DUNDERS:
            method = one.kind.find(sign.format(DUNDERS[name]))
            if method is not None:
                return method(one, right if one is left else left)
    if isinstance(left, Array) or isinstance(right, Array):
        return _guarded(binary, name, left, right)
    if isinstance(left, Sum) or isinstance(right, Sum):
        return _of_sums(name, left, right)
    if isinstance(left, Unknown) or isinstance(right, Unknown):
        return mixed(left, right)
    if name in COMPARISONS:
        return _compared(name, left, right)
    if not (isinstance(left, PLAIN) and isinstance(right, PLAIN)):
        return _joined_path(name, left, right)
    try:
        _bounded(name, left, right)
    except TooLarge:
        return mixed()
    return _guarded(OPERATORS[name], left, right)


def _of_sums(name: str, left: Value, right: Value) -> Value:
    if name in COMPARISONS:
        return mixed()
    held, other = (left, right) if isinstance(left, Sum) else (right, left)
    if isinstance(other, Unknown):
        return held
    if isinstance(other, (list, tuple, str, dict, set, Obj)):
        return mixed()
    return _guarded(OPERATORS[name], left, right) if name in OPERATORS else mixed()


def _compared(name: str, left: Value, right: Value) -> Value:
    if name in ("Eq", "NotEq") and not (isinstance(left, PLAIN) and isinstance(right, PLAIN)):
        same = left == right if type(left) is type(right) and isinstance(left, Lib) else left is right
        return same if name == "Eq" else not same
    if not (isinstance(left, PLAIN) and isinstance(right, PLAIN)):
        return mixed()
    return _guarded(OPERATORS[name], left, right)


def _joined_path(name: str, left: Value, right: Value) -> Value:
    """Path(a) / b: the trial keeps paths as texts of their own kind."""

    if name == "Div" and isinstance(left, Path) and isinstance(right, (str, Path)):
        return Path(f"{left.text}/{right.text if isinstance(right, Path) else right}")
    return mixed()


def _guarded(turn: Callable[..., Value], *args: Value) -> Value:
    """A native operation; what it raises is raised in the script."""
    try:
        return turn(*args)
    except (Spent, Raised):
        raise
    except TooLarge:
        return mixed(*args)
    except (ArithmeticError, TypeError, ValueError, LookupError) as error:
        if any(isinstance(arg, (Array, Unknown)) for arg in args):
            return mixed(*args)
        raise Raised(type(error).__name__, str(error)) from None


def _bounded(name: str, left: Value, right: Value) -> None:
    """No text, list or number of a size that no script needs."""
    if name == "Mult":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, (str, bytes, bytearray, list, tuple, deque)) and isinstance(other, int):
                limited(len(one) * max(other, 0))
        if isinstance(left, int) and isinstance(right, int):
            limited(1000 * (left.bit_length() + right.bit_length()))
    elif name == "Pow" and isinstance(left, int) and isinstance(right, int):
        limited(1000 * left.bit_length() * abs(right))
    elif name == "LShift" and isinstance(right, int):
        limited(1000 * right)
    elif name == "Mod" and isinstance(left, (str, bytes)):
        limited(1000 * len(left))
    elif name == "Add" and isinstance(left, (str, bytes, list, tuple)):
        limited(100 * len(left))


def contained(item: Value, container: Value) -> Value:
    """item in container; unknown where that is not decided."""
    if isinstance(container, Obj):
        method = container.kind.find("__contains__")
        return method(container, item) if method is not None else mixed()
    if isinstance(container, Unknown) or isinstance(item, Unknown) or not isinstance(container, PLAIN):
        return mixed()
    if isinstance(container, (list, tuple)) and any(isinstance(each, Unknown) for each in container):
        return mixed() if not any(each is item for each in container) else True
    return _guarded(operator.contains, container, item)


def negated(name: str, value: Value) -> Value:
    """-x, +x, ~x."""
    if isinstance(value, Array):
        if value.lossy or value.num is None or value.num.dtype == object:
            return value
        if name == "Invert":
            return Array(np.invert(value.num)) if value.num.dtype.kind in "biu" else mixed(value)
        if name != "USub" or value.num.dtype == bool:
            return value
        made = Array(-value.num, value.pos if value.price is not None else None)
        made.net, made.price = value.net, None if value.price is None else -value.price
        return made
    if isinstance(value, (Unknown, Sum)) or not isinstance(value, (int, float, np.number)):
        return value if isinstance(value, (Unknown, Sum)) else mixed()
    return _UNARY[name](value)


def name_of(op: ast.AST) -> str:
    return type(op).__name__


__all__ = ["PLAIN", "combine", "contained", "name_of", "negated"]
