"""What a few seeds allow to say."""

import math
import statistics
from collections.abc import Sequence


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's distribution with a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3, .4)."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total * (freedom > 1)) if odd else sine * total
    return (1 - inside) / 2 if t >= 0 else (1 + inside) / 2


def chance_above(values: Sequence[float], bound: float) -> float:
    """p of the one-sided t-test: how likely values as low as these are, were their true mean `bound`. Two or more."""
    spread, mean = statistics.stdev(values), statistics.mean(values)
    if spread == 0:
        return 0.0 if mean < bound else 1.0
    return student_tail((bound - mean) / (spread / math.sqrt(len(values))), len(values) - 1)


def seeds_needed(values: Sequence[float], bound: float, p: float = 0.01, most: int = 99) -> int | None:
    """How many more values like these bring `chance_above` below p: 0 where they do already, None where `most` in all
    would not. One value has no spread, and three are usual: two more."""
    if len(values) < 2:
        return 3 - len(values)
    spread, mean = statistics.stdev(values), statistics.mean(values)
    for count in range(len(values), most + 1):
        if mean < bound and (spread == 0 or student_tail((bound - mean) / (spread / math.sqrt(count)), count - 1) < p):
            return count - len(values)
    return None
