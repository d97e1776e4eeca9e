"""GPTQ: columns are rounded one after another, and those still free make up for the error (arXiv 2210.17323).

The algorithm of #1019, #1060 and #1394. A column that no input ever excites (H_jj = 0) gets H_jj = 1 and weight 0;
H gains damping · mean(diag H) on its diagonal; columns go by descending diag H, the most used first, while there are
many left to make up for them. With U the upper Cholesky factor of the inverse, H⁻¹ = UᵀU, column j takes

    q = clip(round(w_j / s)),   e = (w_j − q s) / U_jj,   w_k ← w_k − e U_jk  for all k > j,

the update for later columns kept for the end of each block. Full GPTQ against a percentile search: −0.0024 bpb (#535).
Everything runs in float64, where damping need hardly ever rise. All that depends on H alone is its `Factor`, made once
where several steps are tried. Rows never meet: matrices of one Hessian, or one matrix at several scales, may be solved
as one, stacked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairway.base.errors import ContractError
from fairway.quant.dead_zone import towards_zero
from fairway.quant.grid import largest
from fairway.quant.rounding import Solution

NEEDS_HESSIAN = True
TAKES_BOOKS = True
OnGrid = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weights in units of their scales -> codes, and what these stand for in the same units."""
RAISES = 8  # times damping may grow tenfold before the Hessian is refused


@dataclass(frozen=True)
class Spec:
    damping: float = 0.01  # of the mean of diag H; #1060 added it twice, #587 used 0.002
    block: int = 128  # columns whose updates are gathered; changes speed, not results

    def __post_init__(self) -> None:
        if not math.isfinite(self.damping) or self.damping <= 0 or self.block < 1:
            raise ValueError(f"damping = {self.damping}, block = {self.block}: positive numbers are needed")


@dataclass(frozen=True, eq=False)
class Factor:
    """What GPTQ needs of a Hessian.

    dead: (cols,) bool, columns without input; order: (cols,) int64, in which columns are rounded; upper: (cols, cols)
    float64, U for columns in that order; damping: what it took; asked: what the Spec said.
    """

    dead: Tensor
    order: Tensor
    upper: Tensor
    damping: float
    asked: float


def factorise(hessian: Tensor, spec: Spec) -> Factor:
    """hessian: (cols, cols) -> its factor, for every `solve` with this damping."""
    h = hessian.double()
    dead = h.diagonal() == 0
    h = h + torch.diag(dead.to(h.dtype))
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    upper, damping = inverse_factor(h[order][:, order], spec.damping)
    return Factor(dead, order, upper, damping, spec.damping)


def solve(
    weight: Tensor,
    scales: Tensor,
    bits: int,
    hessian: Tensor | Factor | None,
    spec: Spec,
    dead_zone: float = 0.0,
    book: Any | None = None,
) -> Solution:
    """weight: (rows, cols); scales: (rows,) float16; hessian: (cols, cols), or a factor -> codes (rows, cols) int8."""
    if hessian is None:
        raise ContractError("rounding = 'gptq' was given no Hessian; calibrate, or choose nearest")
    factor = hessian if isinstance(hessian, Factor) else factorise(hessian, spec)
    if factor.asked != spec.damping:
        raise ContractError(f"rounding = 'gptq': a factor of damping {factor.asked:g}, {spec.damping:g} is wanted")
    w = weight.double().masked_fill(factor.dead[None, :], 0.0)
    free = w[:, factor.order].T.contiguous()
    on_grid = _steps(largest(bits), dead_zone) if book is None else _levels(book)
    columns = _solve_ordered(free, scales.double(), on_grid, factor.upper, spec.block)
    codes = torch.empty_like(columns)
    codes[factor.order] = columns
    facts = {
        "dead_columns": float(factor.dead.sum()),
        "damping": factor.damping,
        "damping_raised": float(factor.damping > spec.damping),
    }
    return Solution(codes.T.contiguous().to(torch.int8), facts)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper triangular U with UᵀU = (H + damping · mean(diag H) · I)⁻¹, and the damping that it took.

    One Cholesky factor of H with its columns reversed and one triangular inverse: half the work of inverting H first
    (#1948). Damping grows tenfold while H is not positive definite; ContractError when that does not help.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ContractError("Hessian: a non-finite entry; the calibration forward overflowed")
    mean = float(hessian.diagonal().mean())
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    for _ in range(RAISES):
        lower, failed = torch.linalg.cholesky_ex((hessian + damping * mean * identity).flip(0, 1))
        if not int(failed):
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), damping
        damping *= 10
    raise ContractError(
        f"Hessian: not positive definite with damping {damping / 10:g}; more calibration text is needed"
    )


def _steps(limit: int, dead_zone: float) -> OnGrid:
    def on_grid(y: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.clamp(towards_zero(y, dead_zone), -limit, limit)
        return code, code

    return on_grid


def _levels(book: Any) -> OnGrid:
    def on_grid(y: Tensor) -> tuple[Tensor, Tensor]:
        code = book.nearest(y)
        return code, book.values(code)

    return on_grid


def _solve_ordered(columns: Tensor, scales: Tensor, on_grid: OnGrid, upper: Tensor, block: int) -> Tensor:
    """columns: (cols, rows), consumed; scales: (rows,); upper: (cols, cols) -> codes (cols, rows)."""
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        free, factor = columns[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(free)
        for j in range(stop - start):
            codes[start + j], value = on_grid(free[j] / scales)
            errors[j] = (free[j] - value * scales) / factor[j, j]
            free[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1.0)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
    return codes
