"""Round to nearest: each weight by itself. The yardstick of the others, and exact where columns are uncorrelated."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.quant.dead_zone import towards_zero
from fairway.quant.grid import largest
from fairway.quant.rounding import Solution

NEEDS_HESSIAN = False


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


def solve(
    weight: Tensor, scales: Tensor, bits: int, hessian: Tensor | None, spec: Spec, dead_zone: float = 0.0
) -> Solution:
    """weight: (rows, cols); scales: (rows,) float16 -> codes (rows, cols) int8. The Hessian is not read."""
    steps = weight.float() / scales.float()[:, None]
    codes = towards_zero(steps, dead_zone)
    return Solution(torch.clamp(codes, -largest(bits), largest(bits)).to(torch.int8), {})
