"""Context mixing: the fewest bytes, for more time. The bits of a code are predicted by several experts and mixed.

A code is coded bit by bit, highest first: does it lie in the upper half of what is left? Each expert is a distribution,
a Gaussian but for the first, and the masses of its two halves answer:

energy      around zero, by a guess from column, row and scale, and bent by the group's own counts, as in `rans`
            (entropy/energy.py, entropy/shapes.py)
centre      around the row that many rows resemble (entropy/centre.py)
regression  around what the row's left part foretells (entropy/regression.py), in groups where that is worth it

Which expert did best in the row lately chooses the weights they are mixed with (entropy/mixing.py). Rows are coded side
by side, one lane each; four lanes share a coder: 4 bytes for each 16,384 codes and 8 for each group.
"""

import struct
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fairway.artifact.entropy import energy, lanes, mixing, rans, shapes
from fairway.artifact.entropy.centre import Centre
from fairway.artifact.entropy.regression import Regression, worth
from fairway.artifact.entropy.shapes import Shapes
from fairway.artifact.entropy.tables import Ints, exp2, log2, log2_squares, normal_at
from fairway.artifact.groups import Codes, Group, GroupLayout
from fairway.quant.grid import largest

CODES_A_LANE, LANES_MORE = 4096, 8
LANES_A_STATE = 4  # with a state for each lane a group of 172,032 codes took 0.12 % more
FIRST = 2  # rows of the first block
HEAD = struct.Struct("<4hIBbBB")  # weights, mean square, log2 of the ridge or 0, least class, classes, factors
RIDGE, MOST_RIDGE = 8, 20  # log2 of rows of mean square; 2^6 and 2^10 lost 0.1 to 0.3 % of the tables
WORTH = 0.0008  # bits a code below which regression is not used: it would not pay for its time
TABLE_BITS = 16  # of the frequencies that shapes are fitted with
FINE = 16  # parts of a code that means are counted in
POINTS, END = 1024, 9  # of the normal distribution: points in a standard deviation, standard deviations
MASS, SPREAD = 24, 12  # binary digits of an expert's mass; 2^-12 of it is spread evenly, so that nothing is impossible
LEAST_SPAN, LARGEST_SPAN = -512, 1023  # log2 σ² in 64ths
MEMORY = 4  # log2 of how many codes of the row a choice looks back on
MARGIN = 16  # 64ths of a bit a code by which another expert must be better than `energy` to be chosen


CODES_NUMBERS = True


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


def encode(group: Group, spec: Spec) -> bytes:
    layout, count = group.layout, lane_count(group.layout)
    found = lanes.bands(layout)
    parts = [(band, np.asarray(lanes.stacked([group.codes[p] for p in band.places]), np.int8)) for band in found]
    prior = energy.mean_square(group.codes)
    weights = energy.fitted(parts, layout.tensors, prior, FIRST, count)
    ridge = RIDGE if max(map(worth, group.codes)) > WORTH else 0
    guesses = [
        piece.T.reshape(-1)
        for band, codes in parts
        for piece in energy.guesses(band, codes, layout.tensors, weights, prior, FIRST, count)
    ]
    flat = np.concatenate([codes.reshape(-1) for _, codes in parts])
    bent = shapes.fitted(np.concatenate(guesses), flat, largest(layout.bits), TABLE_BITS)
    log = _Log(state_count(layout))
    for band, codes in parts:
        _walk(band, layout, _Model(weights, prior, ridge, bent), log, codes)
    head = HEAD.pack(*weights.tolist(), prior, ridge, bent.least, bent.classes, len(bent.bends))
    return head + bent.bends.tobytes() + rans.encode(*log.symbols(), log.widths, log.states, mixing.BITS)


def decode(blob: bytes, layout: GroupLayout) -> tuple[Codes, ...]:
    if len(blob) < HEAD.size:
        raise ValueError("cut short before its model")
    *weights, prior, ridge, least, classes, factors = HEAD.unpack_from(blob)
    if not 1 <= prior <= 16 * largest(layout.bits) ** 2 or ridge > MOST_RIDGE or not shapes.valid(least, classes):
        raise ValueError(
            f"mean square {prior / 16:g}, ridge 2^{ridge}, {classes} classes from {least}: impossible on this grid"
        )
    start = HEAD.size + factors
    if factors not in (0, largest(layout.bits) + 1) or len(blob) < start:
        raise ValueError(f"{factors} factors where codes have {largest(layout.bits) + 1} magnitudes")
    bends = np.frombuffer(blob, dtype=np.int8, count=factors, offset=HEAD.size)
    model = _Model(np.array(weights, dtype=np.int64), prior, ridge, Shapes(least, classes, bends))
    reader = _Reader(rans.Decoder(blob[start:], state_count(layout), mixing.BITS))
    codes: list[Codes] = [np.zeros((0, 0), np.int8)] * len(layout.tensors)
    for band in lanes.bands(layout):
        whole = _walk(band, layout, model, reader, None)
        for place, piece in zip(band.places, lanes.unstacked(band, whole), strict=True):
            codes[place] = piece
    reader.stream.finish()
    return tuple(codes)


def lane_count(layout: GroupLayout) -> int:
    """How many lanes a group has."""
    return lanes.lane_count(layout, CODES_A_LANE, LANES_MORE)


def state_count(layout: GroupLayout) -> int:
    """How many coders the lanes take in turns."""
    return -(-lane_count(layout) // LANES_A_STATE)


@dataclass(frozen=True, eq=False)
class _Model:
    """What a blob says about its codes."""

    weights: Ints
    prior: int
    ridge: int
    shapes: Shapes


class _Log:
    """The encoder's side: knows the bits, and keeps them with their probabilities."""

    def __init__(self, states: int) -> None:
        self.states = states
        self.starts: list[NDArray[np.uint16]] = []
        self.freqs: list[NDArray[np.uint16]] = []
        self.widths: list[int] = []

    def bit(self, found: Ints, known: Ints | None) -> Ints:
        assert known is not None
        ones = found >> 16 - mixing.BITS
        self.starts.append(np.where(known, 0, ones).astype(np.uint16))
        self.freqs.append(np.where(known, ones, (1 << mixing.BITS) - ones).astype(np.uint16))
        self.widths += [min(self.states, len(ones) - at) for at in range(0, len(ones), self.states)]
        return known

    def symbols(self) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        return np.concatenate(self.starts), np.concatenate(self.freqs)


class _Reader:
    """The decoder's side."""

    def __init__(self, stream: rans.Decoder) -> None:
        self.stream = stream

    def bit(self, found: Ints, known: Ints | None) -> Ints:
        ones = (found >> 16 - mixing.BITS).astype(np.uint32)
        bits = np.empty(len(ones), dtype=np.int64)
        for at in range(0, len(ones), len(self.stream.states)):
            here = ones[at : at + len(self.stream.states)]
            slots = self.stream.slots(len(here))
            one = slots < here
            self.stream.advance(slots, here * ~one, np.where(one, here, np.uint32(1 << mixing.BITS) - here))
            bits[at : at + len(here)] = one
        return bits


def _walk(band: lanes.Band, layout: GroupLayout, model: _Model, coder: _Log | _Reader, known: Codes | None) -> Codes:
    """(tall, cols): the band's codes, known or read. Both sides do the same, so that they cannot differ."""
    bits, half = layout.bits, 1 << (layout.bits - 1)
    out = np.empty((band.tall, band.cols), dtype=np.int8)
    past, mass = _Past(band, layout, model), _masses(model.shapes, bits)
    mixer = mixing.Mixer(past.experts, bits)
    for begin, end in lanes.blocks(band.tall, FIRST, lane_count(layout)):
        block = _Block(past, begin, end)
        costs = np.zeros((past.experts, end - begin), dtype=np.int64)
        for column in range(band.cols):
            classes, means, spans = block.experts(column)
            values = None if known is None else known[begin:end, column].astype(np.int64) + half
            codes, masses = _code(mass, classes, means, spans, costs.argmin(axis=0), mixer, coder, bits, values)
            costs += -(costs >> MEMORY) - log2(masses)
            costs[1:] += MARGIN
            block.add(column, codes)
            out[begin:end, column] = codes
        past.add(begin, out[begin:end])
    if bool((out < -largest(bits)).any()):
        raise ValueError(f"a code lies outside int{bits}'s ±{largest(bits)}")
    return out


def _code(
    mass: Ints,
    classes: Ints,
    means: Ints,
    spans: Ints,
    choice: Ints,
    mixer: mixing.Mixer,
    coder: _Log | _Reader,
    bits: int,
    values: Ints | None,
) -> tuple[Ints, Ints]:
    """(lanes,) codes, and (experts, lanes) the mass that each expert gave them.

    mass, classes: `_masses`, and (lanes,) which of its rows is the first expert; means, spans: (others, lanes) in
    sixteenths of a code, and log2 σ² in 64ths; values: codes + 2^(bits − 1) if known.
    """
    half, normal, stretch = 1 << (bits - 1), _normal(), mixing.stretches()
    inverse = _inverses().take(np.clip(spans, LEAST_SPAN, LARGEST_SPAN) - LEAST_SPAN)
    low, rows = np.zeros(means.shape[1], dtype=np.int64), classes * ((1 << bits) + 1)
    below = np.zeros((1 + len(means), len(low)), dtype=np.int64)
    above, middle = np.full_like(below, (1 << MASS) + (1 << (MASS - SPREAD))), np.empty_like(below)
    node = np.ones_like(low)
    for depth in range(bits):
        step = half >> depth
        edge = low + step
        place = ((edge - half) * FINE - FINE // 2 - means) * inverse >> 16
        middle[0] = mass.take(rows + edge)
        middle[1:] = normal.take(np.clip(place, -END * POINTS, END * POINTS) + END * POINTS)
        middle += edge << (MASS - SPREAD - bits)
        inputs = stretch.take(((above - middle) << 16) // (above - below))
        inputs[1:] -= inputs[0]
        found = mixer.mix(depth, choice, node, inputs)
        bit = coder.bit(found, None if values is None else values // step & 1)
        mixer.learn(depth, choice, node, inputs, found, bit)
        low += bit * step
        node = 2 * node + bit
        ones = bit > 0
        below, above = np.where(ones, middle, below), np.where(ones, above, middle)
    return low - half, above - below


class _Past:
    """What a band's earlier blocks taught."""

    def __init__(self, band: lanes.Band, layout: GroupLayout, model: _Model) -> None:
        self.band, self.model = band, model
        self.columns, self.centre = energy.Columns(band, model.prior), Centre(band.cols)
        self.scales = energy.scale_terms(band, layout.tensors)
        ridge = 1 << model.ridge
        self.regressions = [Regression(band.cols, ridge, model.prior) for _ in band.places] if model.ridge else []
        self.experts = 3 if self.regressions else 2

    def add(self, begin: int, codes: Codes) -> None:
        """codes: (rows, cols), the rows from `begin` on."""
        self.columns.add(begin, codes)
        self.centre.add(codes)
        for place, regression in enumerate(self.regressions):
            regression.add(codes[self.mine(place, begin)])

    def mine(self, place: int, begin: int) -> slice:
        """Which rows from `begin` on are of one of the band's tensors."""
        tensors = len(self.band.places)
        return slice((place - begin) % tensors, None, tensors)


class _Block:
    """What is known of a block's rows while they are coded, column by column."""

    def __init__(self, past: _Past, begin: int, end: int) -> None:
        self.past, self.begin, width = past, begin, end - begin
        self.column = past.columns.terms()[lanes.owners(past.band, begin, end)].T
        self.scale, self.centre = past.scales[begin:end], past.centre.place()
        self.sums, self.offs = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
        self.means = np.zeros((past.experts - 1, width), dtype=np.int64)
        self.spans = np.zeros_like(self.means)
        self.residuals = np.zeros((past.band.cols if past.regressions else 0, width), dtype=np.int64)

    def experts(self, column: int) -> tuple[Ints, Ints, Ints]:
        """(lanes,) classes of the first expert; (others, lanes) means in sixteenths of a code, and log2 σ² in 64ths."""
        prior, weights = self.past.model.prior, self.past.model.weights
        if column % energy.RUN == 0:
            here = self.column[column : column + energy.RUN]
            self.guesses = energy.guess(weights, here, energy.row_terms(self.sums, column, prior), self.scale)
            self.classes = self.past.model.shapes.of(self.guesses)
            self.spans[0] = log2_squares().take((self.offs // FINE + prior // 32) // (column + 1), mode="clip")
        self.means[0] = self.centre[column]
        for place, regression in enumerate(self.past.regressions):
            mine = self.past.mine(place, self.begin)
            self.means[1, mine] = regression.expected(column, self.residuals[:, mine])
            self.spans[1, mine] = self.guesses[column % energy.RUN, mine] - regression.gains[column]
        return self.classes[column % energy.RUN], self.means, self.spans

    def add(self, column: int, codes: Ints) -> None:
        """codes: (lanes,)"""
        self.sums += codes * codes
        self.offs += (FINE * codes - self.centre[column]) ** 2
        if self.past.regressions:
            self.residuals[column] = FINE * codes - self.means[1]


def _masses(bent: Shapes, bits: int) -> Ints:
    """The first expert's mass of all codes below each of the 2^bits + 1 edges, class after class, in one line."""
    weights = bent.weights(largest(bits))
    sums = np.cumsum(weights, axis=1)
    edges = np.zeros((bent.classes, (1 << bits) + 1), dtype=np.int64)
    edges[:, 2:] = (sums << MASS) // sums[:, -1:]  # sums below 2^38: factors are below 2^8
    return edges.reshape(-1)


@cache
def _normal() -> Ints:
    """Φ(i / 1024) · 2^24 for i = −9·1024 … 9·1024."""
    places = np.arange(-END * POINTS, END * POINTS + 1, dtype=np.int64)
    return normal_at(places * ((1 << 16) // POINTS)) >> (40 - MASS)


@cache
def _inverses() -> Ints:
    """2^16 · 1024 / 16 / σ for the spans."""
    return exp2(-np.arange(LEAST_SPAN, LARGEST_SPAN + 1, dtype=np.int64) // 2, 20) * (POINTS // FINE) >> 4
