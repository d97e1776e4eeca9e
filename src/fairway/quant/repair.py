"""Low-rank repair: what rounding took from a few matrices is given back as a small product, itself in integers.

LQER (arXiv 2402.02446; #1797): E = W − Ŵ, its singular value decomposition cut to rank r, A = U_r S_r on int2 (one
scale, max/1.5), B = V_rᵀ on int4 (a scale for each group of 64 numbers, max/7.5), Ŵ ← Ŵ + A·B, for the `count` matrices
with the largest error.

weighting "hessian" minimises the error of the outputs, tr((E − AB) H (E − AB)ᵀ) = ‖(E − AB) L‖² with H = L Lᵀ (damped):
the decomposition is that of E L, and B = V_rᵀ L⁻¹. The matrices are chosen by tr(E H Eᵀ) then, those without a Hessian
left out; E's squares choose otherwise.

`refit` stores A better: one int2 scale for columns of singular values far apart rounds all but the first to nothing, so
the columns of U_r are brought to a root mean square of 1 first (scale 1: about the best step for four levels of a
Gaussian, Max 1960) with their longer tail on the side of −2, and B becomes the least-squares answer to the A that is
stored, (ÂᵀÂ)⁻¹ Âᵀ E, which is also the weighted problem's answer, whatever H.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairway.base.errors import ContractError
from fairway.quant.grid import LEAST_SCALE, LEFT, MOST_GROUP, RIGHT, LowRank, Quantized, Tensors
from fairway.quant.parallel import side_by_side

DAMPING = 0.01  # of the mean of diag H, as GPTQ's


@dataclass(frozen=True)
class RepairSpec:
    """Which matrices get back what; see the module."""

    kind: Literal["none", "lqer"] = "none"
    rank: int = 4
    count: int = 3  # matrices, those with the largest error
    group: int = 64  # numbers of B with one scale
    weighting: Literal["plain", "hessian"] = "hessian"  # of the error; #1797: plain
    refit: bool = True  # B answers the A that is stored; #1797: no

    def __post_init__(self) -> None:
        for name in ("rank", "count", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        if self.group > MOST_GROUP:
            raise ValueError(f"group = {self.group}: at most {MOST_GROUP:,} numbers")


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) repairs, or leaves that to a fit."""
    return bool(recipe["quant"]["repair"]["kind"] != "none" or recipe["quant"]["fit"]["budget"])


def repaired(
    tensors: Tensors, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor], spec: RepairSpec
) -> Tensors:
    """The tensors, the chosen ones with their addend. weights: the float weights by name; ContractError where one that
    is to be repaired is missing."""
    if spec.kind == "none":
        return tensors
    integers = {name: value for name, value in tensors.items() if isinstance(value, Quantized)}
    errors = {name: _error(name, value, weights) for name, value in integers.items()}
    if spec.weighting == "hessian":
        errors = {name: error for name, error in errors.items() if name in hessians}
        if not errors:
            raise ContractError("repair: no matrix has a Hessian; calibrate again, or take weighting = 'plain'")
        sizes = {name: float((error @ hessians[name].double() * error).sum()) for name, error in errors.items()}
    else:
        sizes = {name: float(error.square().sum()) for name, error in errors.items()}
    chosen = sorted(sizes, key=lambda name: -sizes[name])[: spec.count]
    known = hessians if spec.weighting == "hessian" else {}
    addends = side_by_side(lambda name: low_rank(errors[name], known.get(name), spec), chosen)
    found = dict(tensors)
    for name, addend in zip(chosen, addends, strict=True):
        found[name] = replace(integers[name], repair=addend)
    return found


def low_rank(error: Tensor, hessian: Tensor | None, spec: RepairSpec) -> LowRank:
    """The addend for one matrix. error: (rows, cols) W − Ŵ; hessian: (cols, cols), or None for the plain error."""
    error, rank = error.double(), min(spec.rank, *error.shape)
    if hessian is None:
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        left, right = u[:, :rank] * s[:rank], v[:rank]
    else:
        lower = _root(hessian.double())
        u, s, v = torch.linalg.svd(error @ lower, full_matrices=False)
        left, right = u[:, :rank] * s[:rank], torch.linalg.solve_triangular(lower, v[:rank], upper=False, left=False)
    scale = _half(left.abs().max() / 1.5)
    if spec.refit:
        left = left / left.square().mean(dim=0).sqrt().clamp(min=LEAST_SCALE)
        left = torch.where(left.amax(dim=0) > -left.amin(dim=0), -left, left)
        scale = _half(torch.ones_like(scale))
    codes = _on(left, scale, LEFT)
    if spec.refit:
        right = torch.linalg.pinv(codes * scale.double()) @ error
    right_codes, right_scales = _grouped(right, spec.group)
    return LowRank(_int8(codes), scale.reshape(1).cpu().numpy(), right_codes, right_scales, spec.group)


def _error(name: str, value: Quantized, weights: Mapping[str, Tensor]) -> Tensor:
    if name not in weights:
        raise ContractError(f"{name}: repair needs its float weights")
    weight = weights[name].detach()
    return weight.double() - torch.from_numpy(value.dequantize()).to(weight.device).double()


def _root(hessian: Tensor) -> Tensor:
    """L with L Lᵀ = H, damped. ContractError where there is none."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal().mean()
    lower, failed = torch.linalg.cholesky_ex(hessian + (DAMPING * mean + (mean == 0).to(mean.dtype)) * identity)
    if int(failed):
        raise ContractError("Hessian: not positive definite; more calibration text is needed")
    return lower


def _grouped(right: Tensor, group: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """B on int4: codes of its shape, and a scale for each group."""
    padded = torch.nn.functional.pad(right.reshape(-1), (0, -right.numel() % group)).reshape(-1, group)
    scales = _half(padded.abs().amax(dim=1) / 7.5)
    codes = _on(padded, scales[:, None], RIGHT).reshape(-1)[: right.numel()].reshape(right.shape)
    return _int8(codes), scales.cpu().numpy()


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(min=LEAST_SCALE).to(torch.float16)


def _on(values: Tensor, scale: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.clamp(torch.round(values / scale.double()), *grid)


def _int8(codes: Tensor) -> NDArray[np.int8]:
    return codes.to(torch.int8).cpu().numpy()
