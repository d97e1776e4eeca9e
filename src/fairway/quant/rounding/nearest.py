"""Round to nearest: each weight by itself. The yardstick of the others, and exact where columns are uncorrelated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.quant.grid import nearest_codes
from fairway.quant.rounding import Solution

NEEDS_HESSIAN = False


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


def solve(weight: Tensor, scales: Tensor, bits: int, hessian: Tensor | None, spec: Spec) -> Solution:
    """weight: (rows, cols); scales: (rows,) float16 -> codes (rows, cols) int8. The Hessian is not read."""
    return Solution(nearest_codes(weight.float(), scales, bits).to(torch.int8), {})
