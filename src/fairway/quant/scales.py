"""Scale rules: where a row of the grid ends. clip = largest code · scale.

percentile  per row, of a few quantiles of |w| the clip with the least squared rounding error (#535's lineage)
fixed       one quantile of |w|; the tables' 99.99984th
sdclip      clip = k standard deviations of the row (#1394): k sets the entropy, b + 1.047 − log2 k bits a weight
absolute    clip = k root mean squares of the whole tensor, the same in every row: one step for all its weights

With an entropy coder and errors that weigh alike, one step for all is the optimum: every weight then buys its last bit
for the same error, and loud rows take the bits that quiet ones save (reverse water-filling; Gish and Pierce 1968,
doi 10.1109/TIT.1968.1054193). The equal scales compress to nearly nothing.

With `hessian_weight` λ the clip of row i becomes c_i = k σ_i [1 + λ(r_i − 1)] (#1412: λ = 0.175), r_i the mean over j
of |w_ij| H_jj, divided by its mean over the rows: rows that work on loud inputs get a wider grid and a larger step.

`floor` is the least clip of any row. The reference study had 1.0 there, six standard deviations of its weights: the
grid became absolute, the scales carried no information, and int4 rounded nearly everything away (TECHNIQUES of #1004).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fairway.quant.grid import LEAST_SCALE, largest, nearest_codes

CANDIDATES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # #545's


@dataclass(frozen=True)
class ScaleSpec:
    """How the rows' scales are found; see the module."""

    rule: Literal["percentile", "fixed", "sdclip", "absolute"] = "percentile"
    floor: float = 0.0  # least clip of a row, in units of the weights; the reference study: 1.0
    candidates: tuple[float, ...] = CANDIDATES  # quantiles that "percentile" tries, each in (0, 1]
    percentile: float = 0.9999984  # the quantile of "fixed"
    k: float = 12.85  # deviations of "sdclip" and "absolute"; #1394: 12.85 for int6 matrices, 20 for an int8 embedding
    hessian_weight: float = 0.0  # λ of "sdclip", see the module; 0: clips read no Hessian

    def __post_init__(self) -> None:
        if not math.isfinite(self.floor) or self.floor < 0:
            raise ValueError(f"floor = {self.floor}: a clip of 0 or more is needed")
        if not self.candidates or not all(0 < q <= 1 for q in (*self.candidates, self.percentile)):
            raise ValueError(f"candidates = {self.candidates}, percentile = {self.percentile}: quantiles in (0, 1]")
        if not math.isfinite(self.k) or self.k <= 0:
            raise ValueError(f"k = {self.k}: a positive number of standard deviations is needed")
        if not 0 <= self.hessian_weight < 1:  # NaN is refused too; from 1 on, a clip could be 0
            raise ValueError(f"hessian_weight = {self.hessian_weight}: a number in [0, 1) is needed")
        if self.hessian_weight and self.rule != "sdclip":
            raise ValueError(f"hessian_weight = {self.hessian_weight}: rule = {self.rule!r} has none; choose sdclip")


def row_scales(weight: Tensor, bits: int, spec: ScaleSpec, hessian: Tensor | None = None) -> Tensor:
    """The float16 scale of every row. weight: (rows, cols) float -> (rows,) float16, at least 2^-24.

    hessian: (cols, cols), read with `hessian_weight` alone; tensors that have none (tables) are clipped without it.
    """
    if spec.rule == "sdclip":
        clip = spec.k * weight.std(dim=1, correction=0)
        if spec.hessian_weight and hessian is not None:
            clip = clip * (1 + spec.hessian_weight * (row_loudness(weight, hessian) - 1))
        return _scale(clip, bits, spec.floor)
    if spec.rule == "absolute":
        return _scale(spec.k * weight.square().mean().sqrt().expand(len(weight)), bits, spec.floor)
    quantiles = spec.candidates if spec.rule == "percentile" else (spec.percentile,)
    clips = row_quantiles(weight, quantiles)
    best = _scale(clips[0], bits, spec.floor)
    if len(quantiles) == 1:
        return best
    least = _squared_error(weight, best, bits)
    for clip in clips[1:]:
        scale = _scale(clip, bits, spec.floor)
        error = _squared_error(weight, scale, bits)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def row_loudness(weight: Tensor, hessian: Tensor) -> Tensor:
    """r_i of the module's docstring: (rows,), of mean 1; ones where no row works on any input."""
    loudness = weight.abs() @ hessian.diagonal().to(weight.dtype)
    mean = loudness.mean()
    return loudness / mean if mean > 0 else torch.ones_like(loudness)


def row_quantiles(weight: Tensor, quantiles: tuple[float, ...]) -> list[Tensor]:
    """Quantiles of |w| in every row, linear between neighbours as torch.quantile's, each (rows,).

    Only the few largest are sorted out: 0.999 of 1,792 columns needs three of them.
    """
    last = weight.shape[1] - 1
    keep = last - math.floor(min(quantiles) * last) + 1
    top = weight.abs().topk(keep, dim=1).values  # descending: top[:, i] is sorted position last − i
    found = []
    for quantile in quantiles:
        below = math.floor(quantile * last)
        share = quantile * last - below
        low, high = top[:, last - below], top[:, max(last - below - 1, 0)]
        found.append(torch.lerp(low, high, share))
    return found


def _scale(clip: Tensor, bits: int, floor: float) -> Tensor:
    scale = clip.clamp(min=floor) / largest(bits)
    return scale.clamp(min=LEAST_SCALE).to(torch.float16)


def _squared_error(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    step = scales.to(weight.dtype)
    return (nearest_codes(weight, step, bits) * step[:, None] - weight).square().sum(dim=1)
