"""Tables of frequencies from a few bytes: a Gaussian for each class of variance, bent by what a group's codes do.

Class c of a group stands for log2 σ² = (least + c) / 4. Its table is the mass of that Gaussian between the halves, the
tails counted to the largest codes. One factor for each magnitude, the same in all classes, then bends them: the zeros
that pruning or a dead zone left, the ends that clipping filled. Factors are 2^(t / 16), t one signed byte.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairway.artifact.entropy.tables import NORMAL_ONE, Ints, exp2, normal_at, quantised

CLASS = 16  # 64ths of an octave of variance in a class: σ is right within 4.5 %; by estimate 0.001 bits a code
MOST_CLASSES = 96
LEAST_CLASS, LARGEST_CLASS = -32, 63  # σ = 2^-4 … 2^7.9
STEEPEST = 64  # the largest factor is 2^±4


@dataclass(frozen=True, eq=False)
class Shapes:
    """least: the first class; classes: how many; bends: (largest + 1,) the factors' logarithms, or none."""

    least: int
    classes: int
    bends: NDArray[np.int8]

    def of(self, guesses: Ints) -> Ints:
        """The classes of log-variances in 64ths of an octave."""
        return np.clip((guesses // CLASS) - self.least, 0, self.classes - 1)

    def frequencies(self, largest: int, bits: int) -> Ints:
        """(classes, 2 · largest + 1) frequencies of codes −largest … largest, each row's sum 2^bits."""
        weights = self.weights(largest)
        return quantised(weights, bits)

    def weights(self, largest: int) -> Ints:
        """(classes, 2 · largest + 1) the same before they are quantised, each sum below 2^40."""
        inverse = exp2(-8 * (self.least + np.arange(self.classes, dtype=np.int64)), 15)
        halves = 2 * np.arange(-largest, largest, dtype=np.int64) + 1
        inner = normal_at(halves * inverse[:, None])
        ends = np.zeros((self.classes, 1), dtype=np.int64)
        mass = np.diff(np.concatenate([ends, inner, ends + NORMAL_ONE], axis=1), axis=1) >> 10
        if not self.bends.size:
            return mass
        factors = exp2(4 * self.bends.astype(np.int64), 10)
        return (mass * factors[np.abs(np.arange(-largest, largest + 1))] >> 10) + 1


def valid(least: int, classes: int) -> bool:
    """Whether classes from `least` on can be."""
    return LEAST_CLASS <= least <= LARGEST_CLASS and 1 <= classes <= MOST_CLASSES


def fitted(guesses: Ints, codes: NDArray[np.int8], largest: int, bits: int) -> Shapes:
    """The classes and factors for these codes and their log-variances, both (count,). Factors stay away where their
    bytes would not come back."""
    low, high = int(guesses.min()) // CLASS, int(guesses.max()) // CLASS
    least = min(max(low, LEAST_CLASS), LARGEST_CLASS)
    classes = min(max(high, least), LARGEST_CLASS, least + MOST_CLASSES - 1) - least + 1
    plain = Shapes(least, classes, np.zeros(0, dtype=np.int8))
    place = plain.of(guesses) * (2 * largest + 1) + codes.astype(np.int64) + largest
    counts = np.bincount(place, minlength=classes * (2 * largest + 1)).reshape(classes, -1)
    magnitude = np.abs(np.arange(-largest, largest + 1))
    seen = np.bincount(magnitude, weights=counts.sum(axis=0))
    best, bends = plain, np.zeros(largest + 1)
    cost = _bytes(plain, counts, largest, bits)
    for _ in range(3):
        shares = Shapes(least, classes, bends.astype(np.int8)).frequencies(largest, bits)
        expected = (counts.sum(axis=1)[:, None] * (shares / (1 << bits))).sum(axis=0)
        excess = np.log2((seen + 2) / (np.bincount(magnitude, weights=expected) + 2))
        bends = np.clip(np.round(bends + 16 * excess), -STEEPEST, STEEPEST - 1)
        bent = Shapes(least, classes, bends.astype(np.int8))
        if (new := _bytes(bent, counts, largest, bits) + largest + 1) < cost:
            best, cost = bent, new
    return best


def _bytes(shapes: Shapes, counts: NDArray[np.int64], largest: int, bits: int) -> float:
    """What codes cost that occur so often in the classes."""
    return float((counts * (bits - np.log2(shapes.frequencies(largest, bits)))).sum()) / 8
