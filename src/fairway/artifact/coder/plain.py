"""Packed bits: b bits a code, the first code in the highest bits. What int-b costs without an entropy coder.

A coder that has nothing to gain from frequencies: it opens fastest and is the yardstick of the others. On Gaussian int5
codes 9.9 % above their entropy.
"""

from dataclasses import dataclass

import numpy as np

from fairway.artifact.groups import Codes, Group, GroupLayout, flatten, unflatten
from fairway.quant.grid import largest

CHUNK = 1 << 20  # codes unpacked at a time, a multiple of 8: bits take eight times the memory of their bytes


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


def pack(codes: Codes, bits: int) -> bytes:
    """codes: (count,) int8 on int-b's grid -> ceil(count · bits / 8) bytes."""
    limit = largest(bits)
    pieces = []
    for start in range(0, len(codes), CHUNK):
        values = (codes[start : start + CHUNK].astype(np.int16) + limit).astype(np.uint8)
        pieces.append(np.packbits(np.unpackbits(values[:, None], axis=1)[:, 8 - bits :]).tobytes())
    return b"".join(pieces)


def unpack(blob: bytes, count: int, bits: int) -> Codes:
    """The inverse of `pack`: (count,) int8. ValueError where the length or the filling bits are wrong."""
    if len(blob) != -(-count * bits // 8):
        raise ValueError(f"{len(blob):,} bytes cannot hold {count:,} codes of {bits} bits")
    codes = np.empty(count, dtype=np.int8)
    stored = np.frombuffer(blob, dtype=np.uint8)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        piece = np.unpackbits(stored[start * bits // 8 : -(-(start + size) * bits // 8)])
        if piece[size * bits :].any():
            raise ValueError("bits are set behind the last code")
        wide = np.zeros((size, 8), dtype=np.uint8)
        wide[:, 8 - bits :] = piece[: size * bits].reshape(size, bits)
        codes[start : start + size] = np.packbits(wide, axis=1)[:, 0].astype(np.int16) - largest(bits)
    return codes


def encode(group: Group, spec: Spec) -> bytes:
    return pack(flatten(group, "rows"), group.layout.bits)


def decode(blob: bytes, layout: GroupLayout) -> tuple[Codes, ...]:
    return unflatten(unpack(blob, layout.count, layout.bits), layout, "rows")
