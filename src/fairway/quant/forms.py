"""Forms: what a tensor's codes stand for, where they are no steps of the weights' own.

levels    code k stands for sign(k) · levels[|k| − 1] in units of its row's scale, 0 for 0: one half of a symmetric
          codebook. A book of 2^b levels numbers them ±1 … ±2^(b−1), on the grid of int-(b+1), and leaves 0 out.
rotation  codes are those of H·D·w for a row w: D the signs that a seed gives to the columns, H the orthogonal
          Walsh–Hadamard transform in blocks of the largest power of two that divides them (448 = 7 · 64)

H·D makes the coordinates of any row nearly Gaussian, each being a sum of `block` weights with random signs (TurboQuant,
arXiv 2504.19874). A file holds levels and seed, so that reading it asks no machine for an error function or a
generator: decoding is a look-up, multiplications, and a butterfly of float32 sums in a fixed order.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fairway.base.errors import ContractError
from fairway.quant.grid import Quantized, Said, Tensors, largest

Floats = NDArray[np.floating[Any]]

NONE = -1  # a rotation's seed: rows are not rotated
MOST_SEED = 1 << 32
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's (Steele 2014)


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) has a codebook or a rotation."""
    quant = recipe["quant"]
    return any(grid["form"] not in ("steps", None) for grid in (quant["matrix"], quant["table"], *quant["override"]))


class Form(NamedTuple):
    """See the module. rotation: a seed below 2^32, or NONE; levels: positive, ascending, each a float16; without any
    codes count steps."""

    rotation: int
    levels: tuple[float, ...]

    def check(self, bits: int) -> None:
        """ContractError for anything else, for a form that changes nothing, and for levels that int-b cannot number."""
        if not self.levels and self.rotation == NONE:
            raise ContractError("forms: one has neither levels nor a rotation")
        if not NONE <= self.rotation < MOST_SEED:
            raise ContractError(f"forms: seed {self.rotation}; 0 to {MOST_SEED - 1:,} are expected")
        if len(self.levels) > largest(bits):
            raise ContractError(f"forms: {len(self.levels)} levels on int{bits}'s ±{largest(bits)}")
        with np.errstate(over="ignore"):
            stored = np.array(self.levels, np.float16).tolist()
        if stored != list(self.levels) or not all(map(math.isfinite, self.levels)):
            raise ContractError("forms: a level is no finite float16")
        if any(low >= high for low, high in zip((0.0, *self.levels), self.levels, strict=False)):
            raise ContractError("forms: levels do not rise from 0")


@dataclass(frozen=True, eq=False)
class Formed(Quantized):
    """A matrix of integers with a form. ContractError where the form is none, or a code lies beyond its levels."""

    form: Form = field(default_factory=lambda: Form(0, ()))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.form.check(self.bits)
        count = len(self.form.levels)
        if count and self.codes.size and max(int(self.codes.max()), -int(self.codes.min())) > count:
            raise ContractError(f"forms: codes {self.codes.min()} … {self.codes.max()} leave a book of ±{count}")

    def dequantize(self) -> NDArray[np.float32]:
        """The weights, (rows, cols) float32: levels or codes · float32(scale), rotated back, + the addend. Exact to the
        bit on every machine."""
        values = self.codes.astype(np.float32)
        if self.form.levels:
            half = np.array(self.form.levels, np.float32)
            book = np.concatenate([-half[::-1], np.zeros(1, np.float32), half])
            values = book[self.codes.astype(np.int16) + len(half)]
        values = values * self.scales.astype(np.float32)[:, None]
        weights = values if self.form.rotation == NONE else restored(values, self.form.rotation)
        return weights if self.repair is None else weights + self.repair.dequantize()


def listed(tensors: Tensors) -> tuple[Said, ...]:
    """What is to be said of the tensors that have a form."""
    return tuple((name, *value.form) for name, value in tensors.items() if isinstance(value, Formed))


def applied(said: Iterable[Said], tensors: Tensors) -> Tensors:
    """The tensors of which something is said, so formed. ContractError for what cannot be said of them."""
    made: Tensors = {}
    for name, rotation, levels in said:
        value = tensors.get(name)
        if name in made or not isinstance(value, Quantized):
            raise ContractError("forms: a tensor that is named twice, or has no codes")
        made[name] = Formed(value.codes, value.scales, value.bits, value.repair, Form(rotation, tuple(levels)))
    return made


def rotated(rows: Floats, seed: int) -> Floats:
    """H·D·w of every row w. rows: (rows, cols) -> the same shape and dtype."""
    return _hadamard(rows * _signs(rows, seed)) * _norm(rows)


def restored(rows: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """D·H·v of every row v, the inverse of `rotated`: (rows, cols) float32."""
    found: NDArray[np.float32] = _hadamard(rows) * (_signs(rows, seed) * _norm(rows))
    return found


def block(cols: int) -> int:
    """The largest power of two that divides `cols`: how many columns a rotation mixes."""
    return cols & -cols


def _norm(rows: Floats) -> Any:
    return rows.dtype.type(math.sqrt(1 / block(rows.shape[1])))


def _signs(rows: Floats, seed: int) -> Floats:
    """±1 for every column, (cols,): the lowest bits of SplitMix64."""
    x = np.arange(1, rows.shape[1] + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND)
    x ^= x >> np.uint64(31)
    return 1 - 2 * (x & np.uint64(1)).astype(rows.dtype)


def _hadamard(rows: Floats) -> Floats:
    """The Walsh–Hadamard transform of each block of each row, without its norm: log2(block) rounds of sums and
    differences of pairs."""
    size, width = block(rows.shape[1]), 1
    found = rows
    while width < size:
        pairs = found.reshape(-1, 2, width)
        found = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        width *= 2
    return found.reshape(rows.shape)
