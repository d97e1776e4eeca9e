"""How large a code will be, guessed from what is known: the logarithm of its variance, in 64ths of an octave.

    log2 σ² = w0 + w_column · column + w_row · row + w_scale · scale

column  mean square of the column in the tensor's earlier blocks
row     mean square of the row so far, taken anew every eight columns
scale   −2 log2 of the row's scale: a row that was divided by more has smaller codes; zero on a tensor's average

On a grid with one step for all rows the first two speak, on one with a clip for each row the third does. The weights
are fitted by the encoder (Fisher's scoring of the Gaussian likelihood, in floats) and travel as integers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fairway.artifact.entropy.lanes import Band, blocks, owners, stacked
from fairway.artifact.entropy.tables import Ints, log2, log2_squares
from fairway.artifact.groups import Codes, TensorLayout

RUN = 8  # columns between two looks at a row
PRIOR = 8  # how many codes of the whole group's mean square each mean starts from
WEIGHT = 64  # a weight of 1
SAMPLE = 1 << 18  # codes that the weights are fitted on, about


def scale_terms(band: Band, tensors: Sequence[TensorLayout]) -> Ints:
    """(tall,) 64ths of an octave. Scales are float16: (1024 + mantissa) << exponent is exact in integers."""
    found = []
    for place in band.places:
        bits = tensors[place].scales.view(np.uint16).astype(np.int64)
        exponent, mantissa = bits >> 10 & 31, bits & 1023
        value = np.where(exponent > 0, (1024 + mantissa) << np.maximum(exponent - 1, 0), mantissa)
        term = -2 * log2(np.maximum(value, 1))
        found.append(term - int(term.sum()) // len(term))
    return np.asarray(stacked(found), dtype=np.int64)


class Columns:
    """Mean squares of a band's columns, each tensor's own. prior: the group's mean square, in sixteenths."""

    def __init__(self, band: Band, prior: int) -> None:
        self.tensors, self.prior = len(band.places), prior
        self.sums = np.zeros((self.tensors, band.cols), dtype=np.int64)
        self.counts = np.zeros(self.tensors, dtype=np.int64)

    def terms(self) -> Ints:
        """(tensors, cols)"""
        return log2_squares()[(16 * self.sums + PRIOR * self.prior) // (self.counts + PRIOR)[:, None]]

    def add(self, begin: int, codes: Codes) -> None:
        """codes: (rows, cols), the rows from `begin` on."""
        squares = codes.astype(np.int64) ** 2
        for tensor in range(self.tensors):
            mine = squares[(tensor - begin) % self.tensors :: self.tensors]
            self.sums[tensor] += mine.sum(axis=0)
            self.counts[tensor] += len(mine)


def row_terms(sums: Ints, columns: Ints | int, prior: int) -> Ints:
    """sums: squares of the row's first `columns` codes."""
    return log2_squares()[(16 * sums + PRIOR * prior) // (columns + PRIOR)]


def block_row_terms(codes: Codes, prior: int) -> Ints:
    """(runs, rows): the term of a row in each run of eight columns, from the codes before it. codes: (rows, cols)."""
    squares = codes.T.astype(np.int64) ** 2
    starts = np.arange(0, codes.shape[1], RUN)
    sums = np.cumsum(np.add.reduceat(squares, starts, axis=0), axis=0)
    before = np.concatenate([np.zeros((1, len(codes)), dtype=np.int64), sums[:-1]])
    return row_terms(before, starts[:, None], prior)


def guess(weights: Ints, column: Ints, row: Ints, scale: Ints) -> Ints:
    """64ths of an octave of variance."""
    return (weights[0] * WEIGHT + weights[1] * column + weights[2] * row + weights[3] * scale) // WEIGHT


def guesses(
    band: Band, codes: Codes, tensors: Sequence[TensorLayout], weights: Ints, prior: int, first: int, lanes: int
) -> Iterator[Ints]:
    """Of each block (cols, rows) log-variances, where all codes are known. codes: (tall, cols)."""
    columns, scales = Columns(band, prior), scale_terms(band, tensors)
    for begin, end in blocks(band.tall, first, lanes):
        column = columns.terms()[owners(band, begin, end)].T
        row = np.repeat(block_row_terms(codes[begin:end], prior), RUN, axis=0)[: band.cols]
        yield guess(weights, column, row, scales[begin:end])
        columns.add(begin, codes[begin:end])


def mean_square(codes: Sequence[Codes]) -> int:
    """Of all codes, in sixteenths, at least 1."""
    total = sum(int((piece.astype(np.int64) ** 2).sum()) for piece in codes)
    return max(1, 16 * total // max(1, sum(piece.size for piece in codes)))


def fitted(
    parts: Sequence[tuple[Band, Codes]], tensors: Sequence[TensorLayout], prior: int, first: int, lanes: int
) -> Ints:
    """(4,) the weights for these codes, (tall, cols) of each band; w0 in 64ths of an octave, the others in 64ths."""
    rows: list[NDArray[np.float64]] = []
    targets: list[NDArray[np.float64]] = []
    stride = max(1, sum(codes.size for _, codes in parts) // SAMPLE)
    for band, codes in parts:
        columns, scales = Columns(band, prior), scale_terms(band, tensors)
        for begin, end in blocks(band.tall, first, lanes):
            piece = codes[begin:end]
            chosen = np.arange(begin % stride, end - begin, stride)
            if chosen.size:
                column = columns.terms()[owners(band, begin, end)[chosen]]
                row = np.repeat(block_row_terms(piece[chosen], prior), RUN, axis=0)[: band.cols].T
                scale = np.broadcast_to(scales[begin:end][chosen, None], column.shape)
                rows.append(np.stack([column, row, scale], axis=-1).reshape(-1, 3) / 64.0)
                targets.append(piece[chosen].reshape(-1).astype(np.float64) ** 2)
            columns.add(begin, piece)
    return _scored(np.concatenate(rows), np.concatenate(targets) + 0.02)


def _scored(features: NDArray[np.float64], squares: NDArray[np.float64]) -> Ints:
    """log2 σ² = w · (1, features), most likely where squares are those of Gaussian numbers."""
    design = np.concatenate([np.ones((len(features), 1)), features], axis=1) * np.log(2.0)
    curve = design.T @ design + 1e-6 * len(design) * np.eye(4)
    weights = np.array([np.log2(squares.mean()), 0.0, 0.0, 0.0])
    best, step, size = np.inf, np.zeros(4), 1.0
    for _ in range(30):
        guesses = np.clip(design @ (weights + size * step), -9, 18)
        ratio = squares * np.exp(-guesses)
        cost = float((ratio + guesses).sum())
        if cost > best:
            size /= 2
            continue
        weights, best, size = weights + size * step, cost, 1.0
        step = np.linalg.solve(curve, design.T @ (ratio - 1))
    return np.clip(np.round(weights * 64), -2048, 2047).astype(np.int64)
