"""Brotli (RFC 7932), as the late records' entries used it: +0.42 % over the entropy of Gaussian int5 codes.

The first byte of a group says in which order its codes stand: by rows or by columns.
"""

from dataclasses import dataclass

from fairway.artifact.bytestreams import brotli_pack, brotli_unpack
from fairway.artifact.groups import ORDERS, Codes, Group, GroupLayout, Order, decode_bytes, encode_bytes


@dataclass(frozen=True)
class Spec:
    quality: int = 11  # 0 … 11
    window: int = 24  # log2 of bytes, 10 … 24
    orders: tuple[Order, ...] = ORDERS  # of the codes, the smaller result is kept; each costs one compression
    reorder: bool = False  # tries nearest-neighbour chains of rows too, as #1855 did; quadratic in the rows

    def __post_init__(self) -> None:
        if not 0 <= self.quality <= 11 or not 10 <= self.window <= 24 or not self.orders:
            raise ValueError(
                f"quality = {self.quality}, window = {self.window}: 0 … 11 and 10 … 24, and an order, are needed"
            )


def encode(group: Group, spec: Spec) -> bytes:
    return encode_bytes(group, spec.orders, lambda raw: brotli_pack(raw, spec.quality, spec.window), spec.reorder)


def decode(blob: bytes, layout: GroupLayout) -> tuple[Codes, ...]:
    return decode_bytes(blob, layout, brotli_unpack)
