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


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix of integers: codes (rows, cols) int8, scales (rows,) float16, bits 2 … 8.

    Raises ContractError where codes leave the grid, or a scale is negative or not finite.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    bits: int

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

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    def dequantize(self) -> NDArray[np.float32]:
        """The weights: codes · float32(scale), (rows, cols) float32. Exact to the bit on every machine."""
        return self.codes.astype(np.float32) * self.scales.astype(np.float32)[:, None]


Passthrough = NDArray[np.float16] | NDArray[np.float32]
Tensors = dict[str, Quantized | Passthrough]
"""A whole model, by parameter name: integers, or plain float16 (float32 in a file of float weights)."""


def entropy(codes: NDArray[np.int8]) -> float:
    """Bits per code of a coder that knows the codes' frequencies and nothing else (order-0 entropy)."""
    counts = np.bincount(codes.reshape(-1).view(np.uint8), minlength=256)
    share = counts[counts > 0] / max(codes.size, 1)
    return float(-(share * np.log2(share)).sum()) + 0.0
