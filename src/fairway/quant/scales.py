"""Scale rules: where a row of the grid ends. clip = largest code · scale.

percentile  per row, of a few quantiles of |w| the clip with the least squared rounding error (#535's lineage)
fixed       one quantile of |w|; the tables' 99.99984th
sdclip      clip = k standard deviations of the row (#1394): k sets the entropy, b + 1.047 − log2 k bits a weight

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

    rule: Literal["percentile", "fixed", "sdclip"] = "percentile"
    floor: float = 0.0  # least clip of a row, in units of the weights; the reference study: 1.0
    candidates: tuple[float, ...] = CANDIDATES  # quantiles that "percentile" tries, each in (0, 1]
    percentile: float = 0.9999984  # the quantile of "fixed"
    k: float = 12.85  # standard deviations of "sdclip"; #1394: 12.85 for int6 matrices, 20 for an int8 embedding

    def __post_init__(self) -> None:
        if not math.isfinite(self.floor) or self.floor < 0:
            raise ValueError(f"floor = {self.floor}: a clip of 0 or more is needed")
        if not self.candidates or not all(0 < q <= 1 for q in (*self.candidates, self.percentile)):
            raise ValueError(f"candidates = {self.candidates}, percentile = {self.percentile}: quantiles in (0, 1]")
        if not math.isfinite(self.k) or self.k <= 0:
            raise ValueError(f"k = {self.k}: a positive number of standard deviations is needed")


def row_scales(weight: Tensor, bits: int, spec: ScaleSpec) -> Tensor:
    """The float16 scale of every row. weight: (rows, cols) float -> (rows,) float16, at least 2^-24."""
    if spec.rule == "sdclip":
        return _scale(spec.k * weight.std(dim=1, correction=0), bits, spec.floor)
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
