"""A row that many rows resemble: tokens that training never saw end as one vector and a little noise.

The centre is a mean of earlier rows, each weighted by how near it came to the centre itself, so that rows alike gather
weight and all others hardly count. Of 2,048 rows of a small embedding 214 correlated by more than 0.9 with an earlier
one; most differed from it by 0.4 steps, where their codes have a standard deviation of four.
"""

import numpy as np

from fairway.artifact.entropy.energy import RUN
from fairway.artifact.entropy.tables import OCTAVE, SQUARES, Ints, log2_squares
from fairway.artifact.groups import Codes

FINE = 16  # parts of a code in which a centre is counted
SHARPNESS = 1 << 20  # weight of a row that is the centre
FAR = 1 << 20  # a log-variance that no row has
BLUNT = 4  # squares in sixteenths that a row lies off beyond doubt: half a code, from rounding alone


class Centre:
    """Of a band's rows, all tensors together. rows are added in the order of coding."""

    def __init__(self, cols: int) -> None:
        self.sums = np.zeros(cols, dtype=np.int64)
        self.weight = 0

    def place(self) -> Ints:
        """(cols,) in sixteenths of a code."""
        return (2 * FINE * self.sums + self.weight) // (2 * self.weight + 1)

    def add(self, codes: Codes) -> None:
        """codes: (rows, cols)."""
        wide = codes.astype(np.int64)
        off = ((FINE * wide - self.place()) ** 2).sum(axis=1) // (FINE * codes.shape[1])  # mean square, in sixteenths
        weights = SHARPNESS // (BLUNT + off) ** 2
        self.sums += weights @ wide
        self.weight += int(weights.sum())


def terms(sums: Ints, offs: Ints, columns: Ints | int, prior: int) -> Ints:
    """64 · log2 of the mean square distance from the centre, or FAR where the centre leaves more than half of the row's
    squares. sums: squares of the row's first `columns` codes; offs: of their distances, in 256ths; prior: the group's
    mean square, in sixteenths."""
    logs = log2_squares()
    near = logs[np.minimum((offs // 2 + prior) // (8 * columns + 1), SQUARES - 1)]
    plain = logs[np.minimum((128 * sums + prior) // (8 * columns + 1), SQUARES - 1)]
    return np.where(near + OCTAVE < plain, near, FAR)


def block_terms(codes: Codes, place: Ints, prior: int) -> Ints:
    """(runs, rows): the term of a row in each run of eight columns, from the codes before it. codes: (rows, cols)."""
    wide, starts = codes.T.astype(np.int64), np.arange(0, codes.shape[1], RUN)
    found: list[Ints] = []
    for squares in (wide**2, (FINE * wide - place[:, None]) ** 2):
        sums = np.cumsum(np.add.reduceat(squares, starts, axis=0), axis=0)
        found.append(np.concatenate([np.zeros((1, len(codes)), dtype=np.int64), sums[:-1]]))
    return terms(found[0], found[1], starts[:, None], prior)


def chosen(guesses: Ints, near: Ints, place: Ints) -> tuple[Ints, Ints]:
    """Of each code the log-variance to code it with and the whole number to code it around: the centre's where it is
    the smaller one. guesses, near: log-variances around zero and around the centre, (cols, rows); place: (cols,) the
    centre in sixteenths."""
    better = near < guesses
    whole = (place + FINE // 2) // FINE
    return np.where(better, near, guesses), np.where(better, whole[:, None], 0)
