"""What a few seeds, and many documents, allow to say.

A difference is always `ours - theirs`, so that below zero is better where the values are bits. Its two chances are
one-sided: `below` is how likely a difference as low as this is, were the true one at `margin` or above.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MARGIN = 0.005  # nats per token that a record must win by
CHANCE = 0.01  # p that it must be shown with
LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Difference:
    """A mean difference, its interval at LEVEL, and the two one-sided chances; freedom: of Student's distribution."""

    mean: float
    low: float
    high: float
    below: float
    above: float
    freedom: float


def student_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's distribution: I_x(freedom / 2, 1 / 2) / 2 with x = freedom / (freedom + t²), for t >= 0."""
    square = t * t
    tail = _incomplete_beta(freedom / (freedom + square), square / (freedom + square), freedom / 2, 0.5) / 2
    return tail if t >= 0 else 1 - tail


def student_quantile(tail: float, freedom: float) -> float:
    """The t that P(T > t) = tail of; 0 < tail <= 0.5. By Newton's steps from 0: the tail is convex, none goes past."""
    peak = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    t, last = 0.0, -1.0
    while t > last:
        density = peak * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
        t, last = t + (student_tail(t, freedom) - tail) / density, t
    return t


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Where the true mean of two or more values lies, by Student's distribution."""
    found = _difference(*_mean_and_error(values), len(values) - 1, 0.0, level)
    return found.low, found.high


def welch(ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0, level: float = LEVEL) -> Difference:
    """Two means with a variance each, two or more values on both sides; its freedom is no whole number (Welch 1947)."""
    (mean, error), (other, its) = _mean_and_error(ours), _mean_and_error(theirs)
    return _welch(mean - other, error**2, its**2, len(ours), len(theirs), margin, level)


def paired(ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL) -> Difference:
    """The mean of the differences one by one (the same seeds in the same order), two or more: Student's own test."""
    mean, error = _mean_and_error([a - b for a, b in zip(ours, theirs, strict=True)])
    return _difference(mean, error, len(ours) - 1, 0.0, level)


def paired_by_size(differences: npt.ArrayLike, sizes: npt.ArrayLike, level: float = LEVEL) -> Difference:
    """The difference for each unit of size, of parts of unequal sizes: documents' bits and bytes, both (D,), D >= 2.

    What is estimated is the ratio sum(differences) / sum(sizes), the score's own weighing. Its error is that of the
    delta method, each residual divided by what its part leaves to the others (as if the part were left out), and the
    freedom is that of the effective number of parts, sum(sizes)² / sum(sizes²): one long document counts as one,
    however many short ones stand beside it (pocket's 34 count as 9.9). Of null differences of 34 documents, whose
    lengths vary as pocket's do (sigma 1.5), the plain delta method with D - 1 called 3.5 % shown at 1 %, this one
    0.7 %. Where differences are as skewed as an exponential distribution it errs too (4.2 %), as does flipping signs
    (5 %; bench/chances.py).
    """
    bits, size = np.asarray(differences, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    whole = float(size.sum())
    ratio, share = float(bits.sum()) / whole, size / whole
    left = (bits - ratio * size) / np.maximum(1 - share, 1e-12)
    freedom = max(1 / float((share**2).sum()) - 1, 0.1)
    return _difference(ratio, math.sqrt(float((left**2).sum())) / whole, freedom, 0.0, level)


def holm(chances: Sequence[float]) -> list[float]:
    """Chances of several claims, each raised so that the first false claim among all is as unlikely as it says (Holm
    1979): of twelve ideas that change nothing one is below 0.05 every second time."""
    raised, worst = [0.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=lambda at: chances[at])):
        worst = max(worst, min(1.0, (len(chances) - rank) * chances[place]))
        raised[place] = worst
    return raised


def chance_above(values: Sequence[float], bound: float) -> float:
    """p of the one-sided t-test: how likely values as low as these are, were their true mean `bound`. Two or more."""
    mean, error = _mean_and_error(values)
    return _difference(mean - bound, error, len(values) - 1, 0.0, LEVEL).below


def seeds_needed(values: Sequence[float], bound: float, p: float = CHANCE, most: int = 99) -> int | None:
    """How many more values like these bring `chance_above` below p: 0 where they do already, None where `most` in all
    would not. One value has no spread, and three are usual: two more."""
    if len(values) < 2:
        return 3 - len(values) if values[0] < bound else None
    mean, variance = statistics.fmean(values), statistics.variance(values)

    def chance(more: int) -> float:
        count = len(values) + more
        return _difference(mean - bound, math.sqrt(variance / count), count - 1, 0.0, LEVEL).below

    return _fewest(chance, mean < bound, p, most - len(values))


def seeds_needed_of_both(
    ours: Sequence[float], theirs: Sequence[float], margin: float, p: float = CHANCE, most: int = 99
) -> int | None:
    """How many more values like these on each side bring Welch's chance of a difference at or above `margin` below p;
    as `seeds_needed` else."""
    if min(len(ours), len(theirs)) < 2:
        possible = statistics.fmean(ours) - statistics.fmean(theirs) < margin
        return 3 - min(len(ours), len(theirs)) if possible else None
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    variance, its = statistics.variance(ours), statistics.variance(theirs)

    def chance(more: int) -> float:
        count, others = len(ours) + more, len(theirs) + more
        return _welch(mean, variance / count, its / others, count, others, margin, LEVEL).below

    return _fewest(chance, mean < margin, p, most - max(len(ours), len(theirs)))


def nats_per_token(bits_per_byte: float, text_bytes: int, tokens: int) -> float:
    """A score, or a difference of scores, as the challenge's loss, by a run's own bytes and tokens."""
    return bits_per_byte * math.log(2) * text_bytes / tokens


def _fewest(chance: Callable[[int], float], possible: bool, p: float, most: int) -> int | None:
    return next((more for more in range(most + 1) if chance(more) < p), None) if possible else None


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error)."""
    mean = statistics.fmean(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _welch(mean: float, square: float, its: float, count: int, others: int, margin: float, level: float) -> Difference:
    """square, its: the squared standard errors of both means."""
    spread = square**2 / (count - 1) + its**2 / (others - 1)
    freedom = (square + its) ** 2 / spread if spread else count + others - 2
    return _difference(mean, math.sqrt(square + its), freedom, margin, level)


def _difference(mean: float, error: float, freedom: float, margin: float, level: float) -> Difference:
    """Without any spread there is nothing to doubt: both chances are 0 or 1."""
    if error == 0:
        return Difference(mean, mean, mean, float(mean >= margin), float(mean <= margin), freedom)
    wide = student_quantile((1 - level) / 2, freedom) * error
    t = (mean - margin) / error
    return Difference(mean, mean - wide, mean + wide, student_tail(-t, freedom), student_tail(t, freedom), freedom)


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """I_x(a, b), regularised, for rest = 1 - x, by the continued fraction (Abramowitz & Stegun 26.5.8; from the end
    where it converges fast)."""
    if x <= 0 or rest <= 0:
        return float(rest <= 0)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(rest, x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest))
    tiny, c, d = 1e-300, 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 500):  # fewer than 30 terms wherever the freedom is below 10,000
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = 1 + term / c, 1 + term * d
            c, d = c or tiny, 1 / (d or tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * fraction / a
