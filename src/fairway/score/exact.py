"""Exact mode: logits -> integer counts that any machine reproduces.

A decoder must find the encoder's distribution to the last bit, though float64 sums differ by some 5e-15 between batches
and single steps, thread counts and math libraries. So, with everything after the first line in integers,

    z   = round half to even(64 · logit / temperature)
    w   = TABLE[max z − z],             TABLE[d] = round(2^32 · exp(−d/64)), 0 from d = 1464 on
    c   = 1 + floor(w · (2^24 − V) / Σ w),  what is left of 2^24 to the first symbol of the largest z

and c / 2^24 is the distribution that is coded and paid: every symbol has a count, their sum is 2^24. Against the
float64 softmax that costs 1.5e-5 bits per token (the grid) and what V counts of 1 take from the others; in all,
1.5e-5 at V = 1024 and 5.7e-5 at 8192 for normal logits of deviation 3; 3.7e-5 and 3.5e-4 for deviation 5.

A logit within 1e-10 of a rounding boundary could fall on its other side elsewhere. The encoder lists those (`near`,
about one token in 76,000 at V = 1024), the decoder takes over what was rounded there (`overrule`).

Table, grid and counts are the format: a changed digit is another version of it.
"""

import decimal
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.base.errors import ArtifactError, ContractError, HonestyError, RecipeError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TOTAL = 1 << 24  # counts of a distribution; also the precision of the range coder
STEPS = 64  # of the grid in one unit of logit: 1/64 costs 1.5e-5 bits per token, and a finer one more near boundaries
MARGIN = 1e-10 * STEPS  # steps: 1e-10 in units of logit, 20,000 times the differences measured
LARGEST_VOCAB = 1 << 16
# Logits past 2^55 temperatures count as 2^55 of them: max z − z fits in 63 bits. Below that no two grid points merge.
FURTHEST = 2.0**55
# Numbers worked on at once: 512 KB stay in the cache; all of (4096, 2048) at once took 1.3 to 1.6 times as long.
_AT_ONCE = 1 << 16


class Near(NamedTuple):
    """Logits near a rounding boundary, each column (k,) int64; in order of rows, then of symbols."""

    rows: Ints
    symbols: Ints
    z: Ints  # the rounding taken


@functools.cache
def table() -> Ints:
    """(1465,) int64, TABLE[d] = round half to even(2^32 · exp(−d/64)), read-only; its last entry is the first 0.

    Decimal arithmetic is the same everywhere (its exp is rounded correctly, 60 digits here); 30 ms, once.
    """
    weights: list[int] = []
    with decimal.localcontext(decimal.Context(prec=60, rounding=decimal.ROUND_HALF_EVEN)):
        while not weights or weights[-1]:
            weight = (decimal.Decimal(-len(weights)) / STEPS).exp() * 2**32
            weights.append(int(weight.to_integral_value()))
    built = np.array(weights, dtype=np.int64)
    built.flags.writeable = False
    return built


def grid(logits: Tensor, temperature: float = 1.0) -> Ints:
    """z of logits (n, V) float64: (n, V) int64, in units of 1/64 after division by the temperature.

    ArtifactError: a logit that is not finite; HonestyError: logits of another precision than float64.
    """
    z = np.empty(tuple(logits.shape), dtype=np.int64)
    for rows, steps in _steps(logits, temperature):
        np.rint(steps, out=steps)
        z[rows] = steps
    return z


def near(logits: Tensor, temperature: float = 1.0) -> Near:
    """Which of logits (n, V) float64 lie within MARGIN of a rounding boundary, and what `grid` makes of them."""
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for rows, steps in _steps(logits, temperature):
        whole = np.rint(steps)
        np.subtract(steps, whole, out=steps)  # exact
        row, symbol = np.nonzero(np.abs(steps, out=steps) > 0.5 - MARGIN)
        found.append((row + rows.start, symbol, whole[row, symbol]))
    row, symbol, whole = (np.concatenate(column) for column in zip(*found, strict=True))
    return Near(row, symbol, whole.astype(np.int64))


def overrule(z: Ints, there: Near) -> None:
    """Sets z (n, V) in place to the rounding that the encoder took there.

    ArtifactError: a place that does not exist, or a rounding more than one step from the decoder's own: no two machines
    differ by that, so the file is damaged or foreign.
    """
    rows, symbols = there.rows, there.symbols
    inside = (rows >= 0) & (rows < z.shape[0]) & (symbols >= 0) & (symbols < z.shape[1])
    if not inside.all():
        place = int(np.flatnonzero(~inside)[0])
        raise ArtifactError(f"exact: rounding listed for row {rows[place]}, symbol {symbols[place]} of {z.shape}")
    own = z[rows, symbols]
    far = (there.z < own - 1) | (there.z > own + 1)
    if far.any():
        place = int(np.flatnonzero(far)[0])
        raise ArtifactError(
            f"exact: row {rows[place]}, symbol {symbols[place]} is listed as {there.z[place]}, here it is "
            f"{own[place]}; the file is damaged, or these are not its weights"
        )
    z[rows, symbols] = there.z


def counts(z: Ints) -> Ints:
    """Counts (n, V) int64 of grid logits z (n, V) int64: each at least 1, each row of sum TOTAL.

    No int64 overflows: w · (TOTAL − V) < 2^56, and Σ w <= 2^48 for the largest vocabulary.
    """
    vocab = _vocab(z.shape)
    out = np.empty(z.shape, dtype=np.int64)
    for rows in _blocks(z.shape):
        part, c = z[rows], out[rows]
        row, first = np.arange(len(part)), part.argmax(axis=1)  # argmax: the first of the largest
        below = part[row, first][:, None] - part
        np.take(table(), below, out=c, mode="clip")  # past the table's end: its last entry, 0
        total = c.sum(axis=1, keepdims=True)
        c *= TOTAL - vocab
        c //= total
        c += 1
        c[row, first] += TOTAL - c.sum(axis=1)
    return out


def prices(counts_at_target: Ints) -> Floats:
    """Nats, float64: −ln(count / 2^24), 0.0 for a count of TOTAL."""
    shares = np.asarray(counts_at_target) / TOTAL  # exact: a power of two
    return np.asarray(0.0 - np.log(shares))


def _steps(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Floats]]:
    """64 · logits / temperature in blocks of rows, each in memory of its own. The factor 64 rounds nothing, wherever it
    stands in the product; the division by the temperature rounds once."""
    if logits.dtype != torch.float64:
        raise HonestyError(f"exact: logits are {logits.dtype}; only a float64 forward can be decoded elsewhere")
    if not (math.isfinite(temperature) and temperature > 0):
        raise RecipeError(f"exact: temperature {temperature}; give a positive number")
    _vocab(tuple(logits.shape))
    values = logits.detach().cpu().numpy()
    furthest = FURTHEST * temperature
    for rows in _blocks(values.shape):
        part = values[rows]
        low, high = part.min(), part.max()  # NaN passes through both
        if not (math.isfinite(low) and math.isfinite(high)):
            row, symbol = np.argwhere(~np.isfinite(part))[0]
            raise ArtifactError(
                f"exact: logit {part[row, symbol]} at row {rows.start + row}, symbol {symbol}; "
                "look at the weights, or at the rate of the adaptation"
            )
        if max(-low, high) > furthest:
            part = np.clip(part, -furthest, furthest)
        yield rows, part * float(STEPS) if temperature == 1.0 else part / temperature * STEPS


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows that hold about _AT_ONCE numbers each."""
    rows = max(1, _AT_ONCE // shape[1])
    return (slice(begin, min(begin + rows, shape[0])) for begin in range(0, shape[0], rows))


def _vocab(shape: tuple[int, ...]) -> int:
    if len(shape) != 2 or not 2 <= shape[1] <= LARGEST_VOCAB:
        raise ContractError(f"exact: shape {tuple(shape)}; need (n, V) with V of 2 to {LARGEST_VOCAB}")
    return shape[1]
