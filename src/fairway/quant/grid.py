"""What int-b is: a symmetric grid of integers with one float16 scale for each row.

int-b has the 2^b − 1 codes −(2^(b−1)−1) … 2^(b−1)−1; a weight is code · scale of its row. Codes are always found with
the float16 scale that is stored, never with the float32 number it was rounded from: the reference did otherwise, and
its file held other weights than those it had measured.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairway.base.errors import ContractError

LEAST_BITS, MOST_BITS = 2, 8
LEAST_SCALE = 2.0**-24  # the smallest positive float16: a row of zeros has a scale that can divide


def largest(bits: int) -> int:
    """The largest code of int-b: 15 for int5."""
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ContractError(f"bits = {bits}: a grid has {LEAST_BITS} to {MOST_BITS} bits")
    return int(2 ** (bits - 1)) - 1


def nearest_codes(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Round to nearest. weight: (rows, cols); scales: (rows,) -> codes (rows, cols), integers in weight's dtype."""
    limit = largest(bits)
    return torch.clamp(torch.round(weight / scales.to(weight.dtype)[:, None]), -limit, limit)


LEFT, RIGHT = (-2, 1), (-8, 7)  # the grids of a low-rank addend: int2 and int4, lopsided to use every code
MOST_GROUP = 1 << 16  # numbers of one scale: memory on the way back


@dataclass(frozen=True, eq=False)
class LowRank:
    """A small addend A·B of a matrix, itself in integers.

    left: (rows, rank) int8, −2 … 1, A in steps of left_scale, (1,) float16; right: (rank, cols) int8, −8 … 7, B in
    steps of right_scales, float16, one for each `group` of its numbers, row by row. ContractError for anything else.
    """

    left: NDArray[np.int8]
    left_scale: NDArray[np.float16]
    right: NDArray[np.int8]
    right_scales: NDArray[np.float16]
    group: int

    def __post_init__(self) -> None:
        for codes, (least, most) in ((self.left, LEFT), (self.right, RIGHT)):
            if codes.dtype != np.int8 or codes.ndim != 2 or not codes.size:
                raise ContractError(f"repair: {codes.dtype} {codes.shape}; two (·, ·) int8 are expected")
            if codes.min() < least or codes.max() > most:
                raise ContractError(f"repair: codes {codes.min()} … {codes.max()} leave {least} … {most}")
        if self.left.shape[1] != self.right.shape[0] or not 1 <= self.group <= MOST_GROUP:
            raise ContractError(f"repair: {self.left.shape} · {self.right.shape} in groups of {self.group}")
        for scales, count in ((self.left_scale, 1), (self.right_scales, -(-self.right.size // self.group))):
            if scales.dtype != np.float16 or scales.shape != (count,):
                raise ContractError(f"repair: scales {scales.dtype} {scales.shape}; ({count},) float16 is expected")
            if not bool(np.all(np.isfinite(scales) & (scales >= 0))):
                raise ContractError("repair: a scale is negative or not finite")

    def dequantize(self) -> NDArray[np.float32]:
        """A·B: (rows, cols) float32, outer product by outer product, so exact to the bit on every machine."""
        left = self.left.astype(np.float32) * self.left_scale.astype(np.float32)
        steps = np.repeat(self.right_scales.astype(np.float32), self.group)[: self.right.size]
        right = self.right.astype(np.float32) * steps.reshape(self.right.shape)
        total = np.zeros((len(left), right.shape[1]), np.float32)
        for k in range(len(right)):
            total += left[:, k, None] * right[k]
        return total


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix of integers: codes (rows, cols) int8, scales (rows,) float16, bits 2 … 8, and perhaps a small addend.

    Raises ContractError where codes leave the grid, a scale is negative or not finite, or the addend has another shape.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    bits: int
    repair: LowRank | None = None

    def __post_init__(self) -> None:
        limit = largest(self.bits)
        if self.codes.dtype != np.int8 or self.codes.ndim != 2:
            raise ContractError(f"codes: {self.codes.dtype} {self.codes.shape}; (rows, cols) int8 is expected")
        if self.scales.dtype != np.float16 or self.scales.shape != self.codes.shape[:1]:
            raise ContractError(f"scales: {self.scales.dtype} {self.scales.shape}; (rows,) float16 is expected")
        if self.codes.size and (self.codes.max() > limit or self.codes.min() < -limit):
            raise ContractError(f"codes: {self.codes.min()} … {self.codes.max()} leave int{self.bits}'s ±{limit}")
        if not bool(np.all(np.isfinite(self.scales) & (self.scales >= 0))):
            raise ContractError("scales: a negative or non-finite one; clip the weights to float16's range")
        if self.repair is not None and (len(self.repair.left), self.repair.right.shape[1]) != self.codes.shape:
            raise ContractError(f"repair: {self.repair.left.shape} · {self.repair.right.shape} for {self.codes.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    def dequantize(self) -> NDArray[np.float32]:
        """The weights: codes · float32(scale) + the addend, (rows, cols) float32. Exact to the bit on every machine."""
        weights = self.codes.astype(np.float32) * self.scales.astype(np.float32)[:, None]
        return weights if self.repair is None else weights + self.repair.dequantize()


Passthrough = NDArray[np.float16] | NDArray[np.float32]
Tensors = dict[str, Quantized | Passthrough]
"""A whole model, by parameter name: integers, or plain float16 (float32 in a file of float weights)."""

Said = tuple[str, int, tuple[float, ...]]
"""A tensor, and what its codes stand for instead of steps (forms.py): rotation, levels."""


def has(tensors: Tensors, what: str) -> bool:
    """Whether one of them has a "repair", or a "form" (forms.py)."""
    return any(getattr(value, what, None) is not None for value in tensors.values())


def entropy(codes: NDArray[np.int8]) -> float:
    """Bits per code of a coder that knows the codes' frequencies and nothing else (order-0 entropy)."""
    counts = np.bincount(codes.reshape(-1).view(np.uint8), minlength=256)
    share = counts[counts > 0] / max(codes.size, 1)
    return float(-(share * np.log2(share)).sum()) + 0.0
