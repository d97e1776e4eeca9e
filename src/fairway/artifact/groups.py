"""What a coder codes: the integers of all tensors of one part and one bit width, together.

Coders that model context may use all of the layout (part, layer, shapes, the rows' scales: these are decoded first);
byte coders turn a group into bytes here. Codes are made non-negative and, where several fit, packed into one byte as
digits: five of int2 (3^5 ≤ 256), two of int3 or int4, one of the wider grids; a byte coder's Huffman codes cannot spend
less than one bit on a byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fairway.base import slots
from fairway.quant.grid import largest

Codes = NDArray[np.int8]
Order = Literal["rows", "columns"]
ORDERS: tuple[Order, ...] = ("rows", "columns")
REORDERED = 2  # added to the order where a permutation of the rows follows


@dataclass(frozen=True, eq=False)
class TensorLayout:
    """One tensor of a group."""

    name: str
    rows: int
    cols: int
    layer: int | None
    scales: NDArray[np.float16]  # (rows,)


@dataclass(frozen=True, eq=False)
class GroupLayout:
    """All that a decoder knows of a group before it reads the group's bytes."""

    part: str
    bits: int
    tensors: tuple[TensorLayout, ...]

    @property
    def count(self) -> int:
        """How many codes the group holds."""
        return sum(tensor.rows * tensor.cols for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class Group:
    """codes: one (rows, cols) int8 for each tensor of the layout."""

    layout: GroupLayout
    codes: tuple[Codes, ...]


def flatten(group: Group, order: Order) -> Codes:
    """All codes in one line, tensor after tensor, each by rows or by columns: (count,) int8."""
    return np.concatenate([np.ravel(codes, order="C" if order == "rows" else "F") for codes in group.codes])


def unflatten(flat: Codes, layout: GroupLayout, order: Order) -> tuple[Codes, ...]:
    """The inverse of `flatten`. ValueError where codes leave the grid."""
    limit = largest(layout.bits)
    if flat.size and (int(flat.max()) > limit or int(flat.min()) < -limit):
        raise ValueError(f"a code lies outside int{layout.bits}'s ±{limit}")
    found, start = [], 0
    for tensor in layout.tensors:
        piece = flat[start : start + tensor.rows * tensor.cols]
        shape = (tensor.rows, tensor.cols)
        found.append(np.ascontiguousarray(piece.reshape(shape, order="C" if order == "rows" else "F")))
        start += piece.size
    return tuple(found)


def digits_in_byte(bits: int) -> int:
    """How many codes of int-b fit in one byte as digits."""
    base, digits = 2 * largest(bits) + 1, 1
    while base ** (digits + 1) <= 256:
        digits += 1
    return digits


def to_bytes(flat: Codes, bits: int) -> bytes:
    """codes: (count,) int8 -> ceil(count / digits) bytes; the last byte is filled up with code 0."""
    limit, digits = largest(bits), digits_in_byte(bits)
    values = flat.view(np.uint8) + np.uint8(limit)  # modulo 256: −limit … limit become 0 … 2·limit
    if digits == 1:
        return values.tobytes()
    padded = np.full(-(-len(values) // digits) * digits, limit, dtype=np.uint8)
    padded[: len(values)] = values
    places = (2 * limit + 1) ** np.arange(digits, dtype=np.uint16)
    return (padded.reshape(-1, digits) * places).sum(axis=1).astype(np.uint8).tobytes()


def byte_count(count: int, bits: int) -> int:
    """The length of `to_bytes` of `count` codes."""
    return -(-count // digits_in_byte(bits))


def from_bytes(raw: bytes, count: int, bits: int) -> Codes:
    """The inverse of `to_bytes`: (count,) int8. ValueError for a byte that is no digits of codes."""
    limit, digits = largest(bits), digits_in_byte(bits)
    base = 2 * limit + 1
    packed = np.frombuffer(raw, dtype=np.uint8)
    if packed.size and int(packed.max()) >= base**digits:
        raise ValueError(f"a byte holds more than {digits} codes of int{bits}")
    if digits == 1:
        return (packed - np.uint8(limit)).view(np.int8)
    values = np.empty((len(packed), digits), dtype=np.int16)
    rest = packed.astype(np.int16)
    for place in range(digits):
        rest, values[:, place] = np.divmod(rest, base)
    return (values.reshape(-1)[:count] - limit).astype(np.int8)


def encode_bytes(
    group: Group, orders: tuple[Order, ...], pack: Callable[[bytes], bytes], reorder: bool = False
) -> bytes:
    """A byte coder's group: one byte for the order, then the codes packed in the order that came out smallest.

    reorder: tries each order with the rows in a nearest-neighbour chain too; the permutation stands before the codes.
    """
    bits = group.layout.bits
    found = [bytes([ORDERS.index(order)]) + pack(to_bytes(flatten(group, order), bits)) for order in orders]
    if reorder:
        head, moved = slots.optional("fairway.artifact.reorder").chained(group)
        for order in orders:
            kind = bytes([REORDERED + ORDERS.index(order)])
            found.append(kind + head + pack(to_bytes(flatten(moved, order), bits)))
    return min(found, key=len)


def decode_bytes(blob: bytes, layout: GroupLayout, unpack: Callable[[bytes, int], bytes]) -> tuple[Codes, ...]:
    """The inverse of `encode_bytes`; unpack: (blob, size) -> exactly `size` bytes, or ValueError."""
    if not blob or blob[0] >= REORDERED + len(ORDERS):
        raise ValueError("the order of the codes is not given")
    kind, chains, start = blob[0], [], 1
    if kind >= REORDERED:
        start, chains = slots.optional("fairway.artifact.reorder").chains(blob, layout)
    raw = unpack(blob[start:], byte_count(layout.count, layout.bits))
    found = unflatten(from_bytes(raw, layout.count, layout.bits), layout, ORDERS[kind % REORDERED])
    return tuple(codes[np.argsort(rows)] for codes, rows in zip(found, chains, strict=True)) if chains else found
