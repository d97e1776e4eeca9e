"""What numpy alone has, or means otherwise than torch does by the same name: ufunc.accumulate, np.repeat, np.split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fairway.audit.trial.acting import Act, plain
from fairway.audit.trial.arrays import Array, limited, put, scalar, taken
from fairway.audit.trial.given import body_of, index_of, kept, numbers_of, sizes_of
from fairway.audit.trial.making import dtype_of
from fairway.audit.trial.shapes import cat, masked_select, repeat_interleave, stack
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.tensors import METHODS
from fairway.audit.trial.values import UNKNOWN, Lib, Unknown, Value

_UFUNCS = """add subtract multiply maximum minimum logical_or logical_and bitwise_xor bitwise_or bitwise_and
logaddexp""".split()  # noqa: SIM905
_DIRECT = """percentile quantile average ptp argwhere ediff1d float_power rint divmod insert interp
histogram logspace eye identity isclose hypot packbits unpackbits meshgrid atleast_1d atleast_2d bitwise_count diag
diagonal copysign cbrt nancumsum nanmax nanmin trunc signbit unravel_index ravel_multi_index median std var round
around diff array_equiv""".split()  # noqa: SIM905
_PRODUCTS = ("dot", "inner", "vdot", "matmul")
_FEW = 1 << 20  # multiplications


def direct(turn: Callable[..., Any]) -> Callable[..., Value]:
    """A function of numbers, as numpy has it."""

    def act(*args: Value, **kwargs: Value) -> Value:
        if any(isinstance(each, (Unknown, Sum)) or _lossy(each) for each in (*args, *kwargs.values())):
            return kept(args)
        given = [_given(each) for each in args]
        limited(float(sum(np.size(each) for each in given)))
        named = {name: _given(each) for name, each in kwargs.items() if name not in ("out", "where")}
        found = _made(turn(*given, **named))
        out = kwargs.get("out")
        if isinstance(out, Array) and isinstance(found, Array):
            put(out, Ellipsis, found)
            return out
        return found

    return act


def _lossy(value: Value) -> bool:
    return isinstance(value, Array) and value.lossy


def _given(value: Value) -> Any:
    if isinstance(value, Array):
        return numbers_of(value)
    dtype = dtype_of(value) if isinstance(value, Lib) else None
    if dtype is not None:
        return dtype
    if isinstance(value, (list, tuple)):
        return type(value)(_given(each) for each in value)
    return scalar(value)


def _made(found: Any) -> Value:
    if isinstance(found, (tuple, list)):
        return type(found)(_made(each) for each in found)
    return Array(np.asarray(found)) if isinstance(found, (np.ndarray, np.generic)) else found


def _product(name: str) -> Callable[..., Value]:
    def act(one: Value, two: Value, **_: Value) -> Value:
        left, right = numbers_of(one), numbers_of(two)
        limited(float(left.size) * (right.size / max(right.shape[0], 1) if right.ndim > 1 else 1))
        if left.size * right.size > _FEW:
            return UNKNOWN
        return Array(np.asarray(getattr(np, name)(left, right)))

    return act


def _reduced(name: str) -> Callable[..., Value]:
    """np.add.reduce(losses) is their sum."""
    turn = direct(getattr(np, name).reduce)

    def act(array: Value, axis: Value = 0, *args: Value, **kwargs: Value) -> Value:
        if name == "add" and isinstance(array, (Array, list)) and body_of(array).lossy:
            return METHODS["sum"](array, axis, **kwargs)
        return turn(array, axis, *args, **kwargs)

    return act


def _put_at(name: str) -> Callable[..., Value]:
    """np.maximum.at(array, index, values)."""

    def act(array: Value, index: Value, values: Value = None) -> Value:
        at = index_of(index)
        if isinstance(array, Array) and array.num is not None and not isinstance(at, Unknown):
            getattr(np, name).at(array.num, at, numbers_of(values))
        return None

    return act


def _cut(array: Value, where: Value, axis: int = 0, **_: Value) -> Value:
    """np.split, np.array_split, torch.tensor_split: as many parts, or cut at these places."""
    held, at = body_of(array), scalar(where)
    length = held.shape[axis]
    if isinstance(at, int):
        sizes = [length // at + (n < length % at) for n in range(at)]
        ends = np.cumsum(sizes).tolist()
    else:
        ends = [*(length if each is None else int(each) for each in _given(at)), length]
    begins = [0, *ends[:-1]]
    return [taken(held, (slice(None),) * axis + (slice(a, b),)) for a, b in zip(begins, ends, strict=True)]


def _padded(array: Value, widths: Value, mode: Value = "constant", constant_values: Value = 0, **_: Value) -> Value:
    """np.pad(x, 1), (before, after), or a pair for each axis; ids of the padding have no place."""
    held = body_of(array)
    around = np.broadcast_to(np.asarray(_given(widths)), (held.body.ndim, 2))
    if held.lossy:
        assert held.pos is not None
        assert held.coef is not None
        return Array(None, np.pad(held.pos, around, constant_values=-1), np.pad(held.coef, around))
    with_value = {"constant_values": _given(constant_values)} if mode == "constant" else {}
    num = np.pad(numbers_of(held), around, mode=mode, **with_value)
    return Array(num, None if held.pos is None else np.pad(held.pos, around, constant_values=-1))


def _stacked(parts: Value, *_: Value, **__: Value) -> Value:
    """np.vstack: rows one below the other."""
    return stack(parts, 0) if all(body_of(each).body.ndim == 1 for each in parts) else cat(parts, 0)


def _columns(parts: Value, *_: Value, **__: Value) -> Value:
    return stack(parts, 1) if all(body_of(each).body.ndim == 1 for each in parts) else cat(parts, 1)


def _deleted(array: Value, where: Value, axis: Value = None) -> Value:
    """np.delete, of one axis."""
    held = body_of(array)
    left = np.delete(np.arange(held.shape[axis or 0]), _given(where))
    return taken(held, (slice(None),) * (axis or 0) + (left,))


def _put_along(array: Value, index: Value, values: Value, axis: int) -> Value:
    if isinstance(array, Array) and array.num is not None:
        np.put_along_axis(array.num, numbers_of(index), numbers_of(values), axis)
    return None


class Limits:
    """np.iinfo, np.finfo."""

    def __init__(self, kind: Value, *_: Value) -> None:
        dtype = dtype_of(kind)
        if dtype is None:
            raise TypeError
        found = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
        self.min, self.max, self.bits = found.min, found.max, found.bits
        self.eps: Value = float(getattr(found, "eps", 0)) or UNKNOWN
        self.tiny: Value = float(getattr(found, "tiny", 0)) or UNKNOWN


NUMPY: dict[str, Act] = {
    **{f"numpy.{name}": plain(direct(getattr(np, name))) for name in _DIRECT if hasattr(np, name)},
    **{
        f"numpy.{name}.{how}": plain(direct(getattr(getattr(np, name), how)))
        for name in _UFUNCS
        for how in ("accumulate", "reduceat", "outer")
    },
    **{f"numpy.{name}.reduce": plain(_reduced(name)) for name in _UFUNCS},
    **{f"numpy.{name}.at": plain(_put_at(name)) for name in _UFUNCS},
    **{f"numpy.{name}": plain(_product(name)) for name in _PRODUCTS},
    **{f"torch.{name}": plain(_product(name)) for name in ("dot", "vdot", "inner")},
    "numpy.repeat": plain(repeat_interleave),
    **dict.fromkeys(["numpy.split", "numpy.array_split", "torch.tensor_split"], plain(_cut)),
    "numpy.pad": plain(_padded),
    **dict.fromkeys(["numpy.vstack", "torch.vstack", "numpy.row_stack"], plain(_stacked)),
    **dict.fromkeys(["numpy.column_stack", "torch.column_stack"], plain(_columns)),
    "numpy.compress": plain(lambda mask, array, *_: masked_select(array, mask)),
    "numpy.extract": plain(lambda mask, array: masked_select(array, mask)),
    "numpy.delete": plain(_deleted),
    "numpy.put_along_axis": plain(_put_along),
    "numpy.ndarray": plain(lambda shape, *_, **__: Array(np.zeros(sizes_of((shape,)), np.int64))),
    **dict.fromkeys(["*.iinfo", "*.finfo"], plain(Limits)),
    "numpy.bool_": plain(lambda value=False: bool(scalar(value)) if np.ndim(_given(value)) == 0 else UNKNOWN),
}


__all__ = ["NUMPY"]
