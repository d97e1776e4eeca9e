"""rANS over the integers: near the entropy of what is known of each code, and opened with numpy alone.

The model is semi-static. The variance of a code is guessed from its column, the left part of its row and the row's
scale (entropy/energy.py); in a row that many resemble, the distance from those is coded instead (entropy/centre.py).
The guess picks one of at most 96 tables of frequencies (entropy/shapes.py). Weights, classes and factors travel in 16
to 150 bytes a group. Rows are coded side by side, one lane each (entropy/lanes.py): 4 bytes for each 8,704 codes and 32
for each group.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairway.artifact.entropy import centre, energy, lanes, rans, shapes
from fairway.artifact.entropy.centre import Centre
from fairway.artifact.entropy.shapes import Shapes
from fairway.artifact.entropy.tables import Ints
from fairway.artifact.groups import Codes, Group, GroupLayout, TensorLayout
from fairway.quant.grid import largest

CODES_A_LANE, LANES_MORE = 8704, 8  # 3,916 lanes for 33.3M weights in 11 groups, 227 for 1.2M
HEAD = struct.Struct("<4hIbBB")  # weights, mean square, least class, classes, factors


CODES_NUMBERS = True


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


@dataclass(frozen=True, eq=False)
class Model:
    """What a blob says about its codes. weights: see energy; prior: their mean square in sixteenths."""

    weights: Ints
    prior: int
    shapes: Shapes


def encode(group: Group, spec: Spec) -> bytes:
    layout, limit = group.layout, largest(group.layout.bits)
    parts, bits = _parts(group), table_bits(layout.bits)
    model = fit(group)
    table = _packed(model.shapes.frequencies(limit, bits))
    found, widths = [], []
    for codes, guesses in _guesses(layout, parts, model.weights, model.prior):
        found.append(table[(model.shapes.of(guesses) << 8) + codes + limit].reshape(-1))
        widths += [codes.shape[1]] * len(codes)
    packed = np.concatenate(found)
    count = lane_count(layout)
    stream = rans.encode(packed & np.uint32(0xFFFF), packed >> np.uint32(16), widths, count, bits)
    bends = model.shapes.bends
    head = HEAD.pack(*model.weights.tolist(), model.prior, model.shapes.least, model.shapes.classes, len(bends))
    return head + bends.tobytes() + stream


def decode(blob: bytes, layout: GroupLayout) -> tuple[Codes, ...]:
    limit, bits = largest(layout.bits), table_bits(layout.bits)
    model, start = _opened(blob, limit)
    frequencies = model.shapes.frequencies(limit, bits)
    table = _packed(frequencies)
    symbols = np.repeat(
        np.tile(np.arange(2 * limit + 1, dtype=np.uint8), model.shapes.classes), frequencies.reshape(-1)
    )
    stream = rans.Decoder(blob[start:], lane_count(layout), bits)
    codes: list[Codes] = [np.zeros((0, 0), np.int8)] * len(layout.tensors)
    for band in lanes.bands(layout):
        whole = _decode_band(band, layout.tensors, limit, model, stream, table, symbols)
        for place, piece in zip(band.places, lanes.unstacked(band, whole), strict=True):
            codes[place] = piece
    stream.finish()
    return tuple(codes)


def ideal_bytes(group: Group) -> float:
    """What the model's own probabilities, as quantised, say the codes cost: Σ −log2 p, in bytes."""
    limit, bits, model = largest(group.layout.bits), table_bits(group.layout.bits), fit(group)
    cost = bits - np.log2(model.shapes.frequencies(limit, bits))
    return float(
        sum(
            cost[model.shapes.of(guesses), codes + limit].sum()
            for codes, guesses in _guesses(group.layout, _parts(group), model.weights, model.prior)
        )
        / 8
    )


def fit(group: Group) -> Model:
    """The model for these codes."""
    limit, parts = largest(group.layout.bits), _parts(group)
    prior, count = energy.mean_square(group.codes), lane_count(group.layout)
    weights = energy.fitted(parts, group.layout.tensors, prior, _first(count), count)
    pieces = list(_guesses(group.layout, parts, weights, prior))
    guesses = np.concatenate([found.reshape(-1) for _, found in pieces])
    codes = np.concatenate([codes.reshape(-1) for codes, _ in pieces])
    return Model(weights, prior, shapes.fitted(guesses, codes, limit, table_bits(group.layout.bits)))


def lane_count(layout: GroupLayout) -> int:
    """How many lanes a group has."""
    return lanes.lane_count(layout, CODES_A_LANE, LANES_MORE)


def table_bits(bits: int) -> int:
    """Frequencies sum to 2^14, on the wide grids to 2^16: no code has frequency 0, and int8 has 255."""
    return 14 if bits <= 6 else 16


def _first(count: int) -> int:
    """Rows of the first block: columns are known early, at the price of three more blocks."""
    return max(1, count // 8)


def _parts(group: Group) -> list[tuple[lanes.Band, Codes]]:
    found = lanes.bands(group.layout)
    return [(band, np.asarray(lanes.stacked([group.codes[p] for p in band.places]), np.int8)) for band in found]


def _guesses(
    layout: GroupLayout, parts: Sequence[tuple[lanes.Band, Codes]], weights: Ints, prior: int
) -> Iterator[tuple[Ints, Ints]]:
    """Of each block, (cols, rows): what is coded, −largest … largest, and its log-variances."""
    count, limit = lane_count(layout), largest(layout.bits)
    for band, codes in parts:
        middle, first = Centre(band.cols), _first(count)
        plain = energy.guesses(band, codes, layout.tensors, weights, prior, first, count)
        for (begin, end), around_zero in zip(lanes.blocks(band.tall, first, count), plain, strict=True):
            piece, place = codes[begin:end], middle.place()
            near = np.repeat(centre.block_terms(piece, place, prior), energy.RUN, axis=0)[: band.cols]
            guesses, around = centre.chosen(around_zero, near, place)
            yield (piece.T - around + limit) % (2 * limit + 1) - limit, guesses
            middle.add(piece)


def _decode_band(
    band: lanes.Band,
    tensors: Sequence[TensorLayout],
    limit: int,
    model: Model,
    stream: rans.Decoder,
    table: NDArray[np.uint32],
    symbols: NDArray[np.uint8],
) -> Codes:
    """(tall, cols)"""
    found = np.empty((band.tall, band.cols), dtype=np.int8)
    columns, scales, middle = energy.Columns(band, model.prior), energy.scale_terms(band, tensors), Centre(band.cols)
    count, low, high = len(stream.states), np.uint32(0xFFFF), np.uint32(16)
    for begin, end in lanes.blocks(band.tall, _first(count), count):
        width = end - begin
        piece = np.empty((band.cols, width), dtype=np.int64)
        column, place = columns.terms()[lanes.owners(band, begin, end)].T, middle.place()
        sums, offs = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
        for run in range(0, band.cols, energy.RUN):
            here = slice(run, min(run + energy.RUN, band.cols))
            row = energy.row_terms(sums, run, model.prior)
            guesses = energy.guess(model.weights, column[here], row, scales[begin:end])
            guesses, around = centre.chosen(guesses, centre.terms(sums, offs, run, model.prior), place[here])
            classes = model.shapes.of(guesses)
            in_slots, in_table = classes << int(stream.bits), classes << 8
            for step, symbols_here in enumerate(piece[here]):
                slots = stream.slots(width)
                symbol = symbols.take(in_slots[step] + slots)
                packed = table.take(in_table[step] + symbol)
                stream.advance(slots, packed & low, packed >> high)
                symbols_here[:] = symbol
            codes = (piece[here] + around) % (2 * limit + 1) - limit
            piece[here] = codes
            sums += (codes * codes).sum(axis=0)
            offs += ((centre.FINE * codes - place[here, None]) ** 2).sum(axis=0)
        found[begin:end] = piece.T
        columns.add(begin, found[begin:end])
        middle.add(found[begin:end])
    return found


def _packed(frequencies: Ints) -> NDArray[np.uint32]:
    """frequency · 2^16 + start at class · 256 + symbol."""
    table = np.zeros((len(frequencies), 256), dtype=np.uint32)
    starts = np.cumsum(frequencies, axis=1) - frequencies
    table[:, : frequencies.shape[1]] = frequencies << 16 | starts
    return table.reshape(-1)


def _opened(blob: bytes, limit: int) -> tuple[Model, int]:
    """The model that stands at the beginning of a blob, and its length."""
    if len(blob) < HEAD.size:
        raise ValueError("cut short before its model")
    *weights, prior, least, classes, factors = HEAD.unpack_from(blob)
    end = HEAD.size + factors
    if factors not in (0, limit + 1) or len(blob) < end:
        raise ValueError(f"{factors} factors where codes have {limit + 1} magnitudes")
    if not 1 <= prior <= 16 * limit**2 or not shapes.valid(least, classes):
        raise ValueError(f"mean square {prior / 16:g}, {classes} classes from {least}: impossible on this grid")
    bends = np.frombuffer(blob, dtype=np.int8, count=factors, offset=HEAD.size)
    return Model(np.array(weights, dtype=np.int64), prior, Shapes(least, classes, bends)), end
