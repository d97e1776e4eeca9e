"""The section `repair`: low-rank addends of a few matrices (quant/grid.py: LowRank), tensor after tensor.

Of each: A's codes + 2, four in a byte, the first in the lowest bits; B's codes + 8, two in a byte; A's scale and B's
scales, float16, little-endian. All of it squeezed. Ranks and groups stand in the header.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairway.artifact.squeeze import squeeze, unsqueeze
from fairway.base.errors import ContractError
from fairway.quant.grid import LEFT, MOST_GROUP, RIGHT, LowRank, Quantized, Tensors

Listed = tuple[tuple[str, int, int], ...]
"""Tensor, rank, group."""
ARRAYS = ("left", "left_scale", "right", "right_scales")


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) repairs, or leaves that to a fit."""
    return bool(recipe["quant"]["repair"]["kind"] != "none" or recipe["quant"]["fit"]["budget"])


def check(header: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where what a header (header.py) lists cannot be addends of its tensors."""
    coded = {name for group in header.groups for name, _, _, _ in group.tensors}
    names = [name for name, _, _ in header.repair]
    if len(set(names)) != len(names) or not coded.issuperset(names):
        raise ValueError("repair: a tensor that is named twice, or has no codes")
    for name, rank, group in header.repair:
        rows, cols = shapes[name]
        if not 1 <= rank <= min(rows, cols) or not 1 <= group <= MOST_GROUP:
            raise ValueError(f"repair: {name}: rank {rank} in groups of {group} is impossible")


def listed(tensors: Tensors) -> Listed:
    """The tensors that have an addend."""
    return tuple((name, len(addend.right), addend.group) for name, addend in _addends(tensors))


def encode(tensors: Tensors) -> bytes:
    """The section's bytes."""
    return squeeze(b"".join(_to_bytes(addend) for _, addend in _addends(tensors)))


def decode(blob: bytes, found: Listed, tensors: Tensors) -> Tensors:
    """The tensors that have an addend, with it. ValueError or ContractError for bytes that are no addends of these."""
    codes = {name: value for name, value in tensors.items() if isinstance(value, Quantized)}  # the header saw to it
    sizes = {name: _sizes(codes[name].shape, rank, group) for name, rank, group in found}
    whole = sum(map(sum, sizes.values()))
    raw, start = unsqueeze(blob, whole), 0
    if len(raw) != whole:
        raise ValueError(f"{len(raw):,} bytes, {whole:,} expected")
    repaired: Tensors = {}
    for name, rank, group in found:
        size = sum(sizes[name])
        addend = _from_bytes(raw[start : start + size], codes[name].shape, rank, group)
        repaired[name], start = replace(codes[name], repair=addend), start + size
    return repaired


def to_arrays(tensors: Tensors) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    """For a run's integers (integers.py): the addends' arrays by name, and their groups by tensor."""
    found = _addends(tensors)
    arrays = {f"{name}.repair.{part}": getattr(addend, part) for name, addend in found for part in ARRAYS}
    return arrays, {name: addend.group for name, addend in found}


def from_arrays(get: Callable[[str], NDArray[Any]], groups: Mapping[str, int], tensors: Tensors) -> Tensors:
    """The tensors that have an addend, with it. get: an array by its name. ContractError where one is none of these."""
    mended: Tensors = {}
    for name, group in groups.items():
        value = tensors[name]
        if not isinstance(value, Quantized):
            raise ContractError(f"repair: {name} has no codes")
        addend = LowRank(**{part: get(f"{name}.repair.{part}") for part in ARRAYS}, group=group)
        mended[name] = replace(value, repair=addend)
    return mended


def _addends(tensors: Tensors) -> Sequence[tuple[str, LowRank]]:
    return [(n, v.repair) for n, v in tensors.items() if isinstance(v, Quantized) and v.repair is not None]


def _sizes(shape: tuple[int, int], rank: int, group: int) -> tuple[int, int, int]:
    """Bytes of A, B and the scales."""
    rows, cols = shape
    return -(-rows * rank // 4), -(-rank * cols // 2), 2 + 2 * -(-rank * cols // group)


def _to_bytes(addend: LowRank) -> bytes:
    scales = np.concatenate([addend.left_scale, addend.right_scales]).astype("<f2").tobytes()
    return _packed(addend.left, 2, LEFT[0]) + _packed(addend.right, 4, RIGHT[0]) + scales


def _from_bytes(raw: bytes, shape: tuple[int, int], rank: int, group: int) -> LowRank:
    (rows, cols), (left, right, _) = shape, _sizes(shape, rank, group)
    scales = np.frombuffer(raw[left + right :], dtype="<f2").astype(np.float16)
    return LowRank(
        _unpacked(raw[:left], 2, LEFT[0], rows * rank).reshape(rows, rank),
        scales[:1],
        _unpacked(raw[left : left + right], 4, RIGHT[0], rank * cols).reshape(rank, cols),
        scales[1:],
        group,
    )


def _packed(codes: NDArray[np.int8], bits: int, least: int) -> bytes:
    """Codes of `bits` bits each, several in a byte, the last one filled up with the least code."""
    places = 8 // bits
    digits = np.zeros(-(-codes.size // places) * places, np.uint8)
    digits[: codes.size] = codes.reshape(-1) - least
    shifts = np.arange(places, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(digits.reshape(-1, places) << shifts, axis=1).astype(np.uint8).tobytes()


def _unpacked(raw: bytes, bits: int, least: int, count: int) -> NDArray[np.int8]:
    """The inverse of `_packed`; ValueError where the last byte is filled up with anything else."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    digits = (np.frombuffer(raw, np.uint8)[:, None] >> shifts).reshape(-1) & np.uint8((1 << bits) - 1)
    if digits[count:].any():
        raise ValueError("the last byte of the codes holds too many")
    return digits[:count].astype(np.int8) + np.int8(least)
