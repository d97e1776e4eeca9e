"""The reference study's own solver (#545, #576, #1004), kept so that its cost can be measured.

It looks like GPTQ and is not: columns go in ascending order of diag H, the update divides by and spreads along the
plain inverse H⁻¹ (e = (w_j − q s)/H⁻¹_jj, w_k ← w_k − e H⁻¹_jk) without taking rounded columns out of it, and unused
columns have no rule. If the Cholesky factorisation fails, H⁻¹ becomes diag(1/H), which the facts then say. One thing
is not copied: its codes came from float32 scales while float16 ones were stored.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.base.errors import ContractError
from fairway.quant.dead_zone import towards_zero
from fairway.quant.grid import largest
from fairway.quant.rounding import Solution

NEEDS_HESSIAN = True


@dataclass(frozen=True)
class Spec:
    damping: float = 0.01  # of the mean of diag H
    block: int = 128  # columns whose updates are gathered

    def __post_init__(self) -> None:
        if not math.isfinite(self.damping) or self.damping <= 0 or self.block < 1:
            raise ValueError(f"damping = {self.damping}, block = {self.block}: positive numbers are needed")


def solve(
    weight: Tensor, scales: Tensor, bits: int, hessian: Tensor | None, spec: Spec, dead_zone: float = 0.0
) -> Solution:
    """weight: (rows, cols); scales: (rows,) float16; hessian: (cols, cols) -> codes (rows, cols) int8."""
    if hessian is None:
        raise ContractError("rounding = 'ascending_plain' was given no Hessian; calibrate, or choose nearest")
    h = hessian.double()
    h = h + spec.damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    order = torch.argsort(h.diagonal(), stable=True)
    inverse, fallback = _inverse(h[order][:, order])
    columns, step, limit = weight.double()[:, order].T.contiguous(), scales.double(), largest(bits)
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), spec.block):
        stop = min(start + spec.block, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            code = torch.clamp(towards_zero(columns[j] / step, dead_zone), -limit, limit)
            errors[j - start] = (columns[j] - code * step) / inverse[j, j]
            columns[j + 1 : stop].addr_(inverse[j, j + 1 : stop], errors[j - start], alpha=-1.0)
            codes[order[j]] = code
        columns[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1.0)
    return Solution(codes.T.contiguous().to(torch.int8), {"damping": spec.damping, "diagonal_fallback": fallback})


def _inverse(hessian: Tensor) -> tuple[Tensor, float]:
    """H⁻¹, or diag(1/H) and 1.0 where H is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return torch.diag(1 / hessian.diagonal().clamp(min=torch.finfo(hessian.dtype).tiny)), 1.0
    return torch.cholesky_inverse(lower), 0.0
