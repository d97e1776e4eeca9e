"""Arrays made of sizes, numbers and lists: zeros, full, arange, tensor, and their types."""

from __future__ import annotations

from typing import Any

import numpy as np

from fairway.audit.trial.arrays import Array, array_of, limited, scalar
from fairway.audit.trial.given import Act, body_of, sizes_of
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.values import UNKNOWN, Lib, Unknown, Value, mixed


def same(array: Value, *_: Value, **__: Value) -> Value:
    return array


def copied(array: Value, *_: Value, **__: Value) -> Value:
    return array.all(np.array) if isinstance(array, Array) else array


_TYPES = {
    "long": np.int64,
    "int": np.int32,
    "short": np.int16,
    "bool": np.bool_,
    "bool_": np.bool_,
    "float": np.float32,
    "double": np.float64,
    "half": np.float32,
    "bfloat16": np.float32,
    "float16": np.float32,
}


def cast(array: Value, *args: Value, **kwargs: Value) -> Value:
    """to(dtype), astype(dtype): ids and bytes keep their numbers, as the dtype holds them."""
    if not isinstance(array, Array) or array.num is None or array.num.dtype == object:
        return array
    for each in (*args, kwargs.get("dtype")):
        dtype = dtype_of(each)
        if dtype is not None and dtype != array.num.dtype:
            made = Array(array.num.astype(dtype), array.pos).as_picked(array)
            made.net, made.price = array.net, array.price
            return made
    return array


def dtype_of(value: Value) -> Any:
    name = value.name if isinstance(value, (Lib, Dtype)) else value if isinstance(value, str) else ""
    if name in _TYPES:
        return np.dtype(_TYPES[name])
    try:
        return np.dtype(name.lstrip("<")) if name.lstrip("<")[:1] in ("i", "u", "f", "b") and name else None
    except TypeError:
        return None


def wrapping(number: Value = 0) -> Value:
    """np.uint64(n), out of which hashes are made: what is too large begins anew."""
    found = scalar(number)
    if not isinstance(found, (int, np.integer)):
        return UNKNOWN
    return Array(np.asarray(int(found) % (1 << 64), dtype=np.uint64))


class Dtype:
    """np.dtype."""

    def __init__(self, name: Value, *_: Value, **__: Value) -> None:
        kind = dtype_of(name)
        self.name: Value = kind.name if kind is not None else UNKNOWN
        self.itemsize: Value = kind.itemsize if kind is not None else UNKNOWN

    def newbyteorder(self, *_: Value) -> Dtype:
        return self


class Device:
    """torch.device("cuda", 3) or ("cuda:3"): scripts ask its type before they compile."""

    def __init__(self, name: Value = UNKNOWN, index: Value = UNKNOWN, **_: Value) -> None:
        self.type: Value = name.partition(":")[0] if isinstance(name, str) else UNKNOWN
        self.index: Value = index


def typed(name: str) -> Act:
    return lambda array, *args, **kwargs: cast(array, Lib(name))


def made(fill: float) -> Act:
    def act(*shape: Value, **kwargs: Value) -> Value:
        size = kwargs.get("size", kwargs.get("shape"))
        sizes = list(shape) if size is None else [size]
        dtype = kwargs.get("dtype")
        while sizes and isinstance(sizes[-1], (Lib, str)):  # np.zeros(n, np.int64)
            dtype = sizes.pop()
        if dtype is not None and not isinstance(dtype, (Lib, str)):
            dtype = None
        numbers = sizes_of(tuple(sizes))
        limited(np.prod(numbers, dtype=np.float64))
        return _new(numbers, fill, dtype)

    return act


def full_like(array: Value, fill_value: Value, dtype: Value = None, **_: Value) -> Value:
    """torch.full_like, np.full_like: a number in the shape, and of the kind, of an array."""
    value = scalar(fill_value)
    return like(value)(array, dtype) if isinstance(value, (int, float)) else mixed(fill_value)


def full(shape: Value, fill: Value, dtype: Value = None, **_: Value) -> Value:
    numbers = sizes_of((shape,))
    limited(np.prod(numbers, dtype=np.float64))
    value = scalar(fill)
    known = isinstance(value, (int, float))
    return _new(numbers, value if known else 0, dtype, np.asarray(value).dtype if known else None)


def _new(sizes: tuple[int, ...], fill: float, dtype: Value, own: np.dtype[Any] | None = None) -> Array:
    """own: of numbers that are of the kind that they are filled with, where nobody says of which."""
    kind = dtype_of(dtype) or own or np.dtype(np.float64)
    body = (
        np.full(sizes, np.asarray(fill).astype(kind)) if fill else np.zeros(sizes, kind)
    )  # of noughts the system has pages
    array = Array(body)
    if array.num is not None and array.num.dtype.kind in "iu" and array.num.ndim and array.num.size < 5_000_000:
        array.pos = np.full(array.shape, -1, np.int32)  # ids may be written to it, and to views of it
    return array


def like(fill: float) -> Act:
    def act(array: Value, dtype: Value = None, **_: Value) -> Value:
        held = body_of(array)
        kind = dtype if dtype is not None else (Lib(f"x.{held.num.dtype.name}") if held.num is not None else None)
        return _new(held.shape, fill, kind)

    return act


def arange(*args: Value, **kwargs: Value) -> Value:
    numbers = [scalar(each) for each in args if not isinstance(each, Lib)]
    limited(max(abs(each) for each in numbers))
    dtype = dtype_of(kwargs.get("dtype", next((each for each in args if isinstance(each, Lib)), None)))
    return Array(np.arange(*numbers, dtype=dtype))


def tensor(value: Value, dtype: Value = None, **_: Value) -> Value:
    """torch.tensor, np.array, from_numpy, as_tensor: an array of numbers, ids or sums."""
    if isinstance(value, (Unknown, Sum)):
        return value
    held = array_of(value)
    return mixed() if held is None else cast(held, dtype) if dtype is not None else held
