"""Logarithms, powers and the normal distribution as tables of integers, made with integers: equal on every machine.

A table that a math library made would differ in a last bit somewhere, and one bit is another artifact.
"""

from decimal import Decimal, localcontext
from functools import cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

OCTAVE = 64  # parts of an octave in which logarithms are counted
SQUARES = 1 << 18  # squares of codes, in sixteenths: 16 · 127² = 258,064 is the largest
NORMAL_STEP = 128  # points of the normal distribution in one standard deviation
NORMAL_END = 9  # standard deviations where its table ends
NORMAL_ONE = 1 << 40  # the probability 1


def log2(values: Ints, digits: int = 6) -> Ints:
    """floor(2^digits · log2 v) for v in 1 … 2^44, nearly always exactly: the square of v gives one more bit at a time.

    digits: up to 12; 6 count 64ths of an octave.
    """
    whole = np.zeros_like(values)
    for shift in (32, 16, 8, 4, 2, 1):
        above = values >> (whole + shift) > 0
        whole += above * shift
    part = np.where(whole > 30, values >> np.maximum(whole - 30, 0), values << np.maximum(30 - whole, 0))
    found = whole
    for _ in range(digits):
        part = part * part >> 30
        over = part >> 31
        part >>= over
        found = 2 * found + over
    return found


@cache
def log2_squares() -> Ints:
    """64 · log2(v / 16) for v = 0 … 2^18 − 1; v = 0 counts as 1."""
    return log2(np.maximum(np.arange(SQUARES, dtype=np.int64), 1)) - 4 * OCTAVE


@cache
def power2(parts: int) -> Ints:
    """2^(i / parts) · 2^30 for i = 0 … parts − 1; parts is a power of two."""
    root, size = 1 << 121, parts  # 2 · 2^120
    while size > 1:
        root, size = isqrt(root << 120), size // 2
    found, value = [], 1 << 120
    for _ in range(parts):
        found.append(value >> 90)
        value = value * root >> 120
    return np.array(found, dtype=np.int64)


def exp2(exponents: Ints, bits: int) -> Ints:
    """2^(e / 64) · 2^bits, rounded down; e from −64 · 30 to 64 · 20, bits up to 30."""
    whole = exponents >> 6
    value = power2(OCTAVE)[exponents & (OCTAVE - 1)]
    up = whole + bits - 30
    return np.where(up >= 0, value << np.maximum(up, 0), value >> np.maximum(-up, 0))


@cache
def normal() -> Ints:
    """Φ(i / 128) · 2^40 for i = −9·128 … 9·128, by Simpson's rule over decimals of 30 digits."""
    with localcontext() as context:
        context.prec = 30
        half = Decimal(1) / (2 * NORMAL_STEP)
        points = 2 * NORMAL_STEP * NORMAL_END
        density = [(-((i * half) ** 2) / 2).exp() for i in range(points + 1)]
        total, sums = Decimal(0), [Decimal(0)]
        for i in range(0, points, 2):
            total += density[i] + 4 * density[i + 1] + density[i + 2]
            sums.append(total)
        upper = [int(NORMAL_ONE // 2 * value / total) for value in sums]
    above = np.array(upper, dtype=np.int64)
    return np.concatenate([NORMAL_ONE // 2 - above[:0:-1], NORMAL_ONE // 2 + above])


def normal_at(points: Ints) -> Ints:
    """Φ(x) · 2^40 where points = x · 2^16, linear between the table's."""
    place = np.clip(points + (NORMAL_END << 16), 0, (2 * NORMAL_END << 16) - 1)
    table, index, rest = normal(), place >> 9, place & 511
    low = table[index]
    return low + ((table[index + 1] - low) * rest >> 9)


def quantised(weights: Ints, bits: int) -> Ints:
    """Frequencies that sum to 2^bits, none of them 0, in proportion to weights: (tables, symbols), each row's sum in
    1 … 2^45. What rounding leaves over goes to the most frequent symbol, which feels it least."""
    total, symbols = 1 << bits, weights.shape[1]
    sums = weights.sum(axis=1, keepdims=True)
    shares = 1 + weights * (total - symbols) // sums
    place = weights.argmax(axis=1)
    shares[np.arange(len(shares)), place] += total - shares.sum(axis=1)
    return shares
