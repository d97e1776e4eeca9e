"""Magnitude pruning: the smallest weights of a tensor become zero.

Before rounding (the reference study: 2 to 10 % of the averaged weights, Hessians of the unpruned model) GPTQ's feedback
refills many of the zeros; after rounding they stay, which is what buys bytes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PruneSpec:
    when: Literal["never", "before", "after"] = "never"  # of rounding
    fraction: float = 0.0  # of each quantised tensor's weights

    def __post_init__(self) -> None:
        if not math.isfinite(self.fraction) or not 0 <= self.fraction < 1:
            raise ValueError(f"fraction = {self.fraction}: a share in [0, 1) is needed")


def small(weight: Tensor, fraction: float) -> Tensor:
    """Where |w| is strictly below the tensor's `fraction` quantile: a mask of weight's shape.

    Weights equal to the quantile stay, so that a tensor with more zeros than `fraction` is left as it is.
    """
    rank = math.floor(fraction * weight.numel())
    if rank == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    magnitude = weight.abs()
    return magnitude < magnitude.flatten().kthvalue(rank + 1).values  # unlike quantile(), without a limit of 2^24
