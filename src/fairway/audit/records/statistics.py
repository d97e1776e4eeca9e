"""What a few seeds allow to say about a bar: Student's t without scipy."""

import math
import statistics
from collections.abc import Sequence


def tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's distribution; freedom: > 0, whole or not (Welch's is not). By the incomplete beta function
    I_x(freedom/2, 1/2) with x = freedom / (freedom + t²), as its continued fraction (DLMF 8.17.22)."""
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    half = 0.5 * _beta(freedom / (freedom + t * t), freedom / 2, 0.5)
    return half if t >= 0 else 1 - half


def below(values: Sequence[float], bar: float) -> float:
    """p of the one-sample test: how likely a mean as low as this is, were the true mean `bar`. Two or more values."""
    spread, mean = statistics.stdev(values), statistics.fmean(values)
    if spread == 0:
        return 0.0 if mean < bar else 1.0
    return tail((bar - mean) / (spread / math.sqrt(len(values))), len(values) - 1)


def welch(values: Sequence[float], others: Sequence[float], margin: float = 0.0) -> float:
    """p of Welch's test: how likely, were the mean of `values` not below the others' by `margin`. Two or more each."""
    first = statistics.variance(values) / len(values)
    second = statistics.variance(others) / len(others)
    lead = statistics.fmean(others) - margin - statistics.fmean(values)
    if first + second == 0:
        return 0.0 if lead > 0 else 1.0
    freedom = (first + second) ** 2 / (first**2 / (len(values) - 1) + second**2 / (len(others) - 1))
    return tail(lead / math.sqrt(first + second), freedom)


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - _beta(1 - x, b, a)
    logged = a * math.log(x) + b * math.log1p(-x) - math.lgamma(a) - math.lgamma(b) + math.lgamma(a + b)
    return math.exp(logged) * _fraction(x, a, b) / a


def _fraction(x: float, a: float, b: float) -> float:
    """Lentz's evaluation of the continued fraction."""
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    value = d
    for m in range(1, 500):
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + factor * d) or tiny)
            c = (1 + factor / c) or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
