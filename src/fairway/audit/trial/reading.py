"""Shards read by numpy and struct: ids with their places, headers with their counts."""

from __future__ import annotations

import struct

import numpy as np

from fairway.audit.trial import files
from fairway.audit.trial.arrays import Array, put, scalar
from fairway.audit.trial.core import Core
from fairway.audit.trial.files import Path, text_of
from fairway.audit.trial.making import dtype_of
from fairway.audit.trial.values import UNKNOWN, Unknown, Value


def paths(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    text = text_of(args[0])
    return UNKNOWN if text is None else files.found(text)


def joined_path(*parts: Value) -> Value:
    texts = [text_of(each) for each in parts]
    return UNKNOWN if any(each is None for each in texts) else "/".join(str(each) for each in texts)


def path_of(*parts: Value) -> Value:
    found = joined_path(*parts)
    return UNKNOWN if isinstance(found, Unknown) else Path(found)


def fromfile(
    machine: Core,
    source: Value,
    dtype: Value = None,
    count: Value = -1,
    sep: Value = "",
    offset: Value = 0,
    **_: Value,
) -> Value:
    """np.fromfile of a path or an open file, np.frombuffer of what was read of one."""
    text = text_of(source)
    width = dtype_of(dtype)
    if width is None:
        return UNKNOWN
    number, start = scalar(count), scalar(offset)
    if not isinstance(start, int):
        return UNKNOWN
    limit = number if isinstance(number, int) else None
    if isinstance(source, files.Raw):
        return files.read(source, width.itemsize, limit, start, machine.vocabulary)
    size = files.size_of(text) if text is not None else None
    if size is None:
        return UNKNOWN
    at = source.at if isinstance(source, files.File) else 0
    found = files.read(files.Raw(str(text), at, size), width.itemsize, limit, start, machine.vocabulary)
    if isinstance(source, files.File) and isinstance(found, Array):
        source.at = at + start + len(found) * width.itemsize
    return found


def frombuffer(machine: Core, source: Value, *args: Value, **kwargs: Value) -> Value:
    named = {**dict(zip(("dtype", "count", "offset"), args, strict=False)), **kwargs}
    if isinstance(source, (bytes, bytearray)):
        count, offset = (scalar(named.get(name, default)) for name, default in (("count", -1), ("offset", 0)))
        kind = dtype_of(named["dtype"]) if "dtype" in named else np.dtype(np.float64)
        return UNKNOWN if kind is None else Array(np.frombuffer(source, kind, count, offset).copy())
    return fromfile(machine, source, **named) if isinstance(source, files.Raw) else UNKNOWN


def tensor_from(
    machine: Core, source: Value, shared: Value = None, size: Value = -1, dtype: Value = None, **_: Value
) -> Value:
    """torch.from_file(path, shared, size, dtype=...): its first numbers."""
    return fromfile(machine, source, dtype, size)


def read_into(machine: Core, file: files.File, room: Value) -> Value:
    """file.readinto(tokens.numpy()): an array is filled from where the file stands; the bytes that were read."""
    raw = file.read(room.num.nbytes if isinstance(room, Array) and room.num is not None else -1)
    if not isinstance(raw, files.Raw) or not isinstance(room, Array) or room.num is None:
        return UNKNOWN
    found = files.read(raw, room.num.itemsize, None, 0, machine.vocabulary)
    if isinstance(found, Array):
        put(room, slice(len(found)), found)
    return len(raw)


def packed(form: Value, *values: Value) -> Value:
    try:
        return struct.pack(form, *values)
    except struct.error:
        return UNKNOWN


def unpacked(machine: Core, form: Value, source: Value, offset: Value = 0) -> Value:
    """struct.unpack("<256i", header), of a shard or of bytes that the script packed itself."""
    if isinstance(form, str) and isinstance(source, bytes) and isinstance(offset, int):
        try:
            return struct.unpack_from(form, source, offset)
        except struct.error:
            return UNKNOWN
    if not isinstance(source, files.Raw):
        return UNKNOWN
    found = files.read(source, 4, None, scalar(offset), machine.vocabulary)
    return tuple(found.num.tolist()) if isinstance(found, Array) and found.num is not None else UNKNOWN


def memmap(
    machine: Core,
    source: Value,
    dtype: Value = None,
    mode: Value = "r",
    offset: Value = 0,
    shape: Value = None,
    **_: Value,
) -> Value:
    count = None
    if shape is not None:
        count = scalar(shape[0]) if isinstance(shape, tuple) else scalar(shape)
    return fromfile(machine, source, dtype, -1 if count is None else count, offset=offset)
