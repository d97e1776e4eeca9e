"""Partial rotary position embedding (RoFormer, arXiv 2104.09864; partial form #315).

Only the first `dims` of a head's dimensions turn, as two halves a, b: (a, b) -> (a cosθ + b sinθ, −a sinθ + b cosθ),
θ = position · base^(−2i/dims). The base is fixed by the recipe's training context (NTK rule: base·(T/R)^(dims/(dims−2))
for T > R), never by a tensor's length; otherwise a window's distribution would depend on the length of another.
Angles are computed in float64, the one dtype literal of model/: float32 angles void exact decoding.
"""

import torch
from torch import Tensor

from fairway.model.spec import RotarySpec


def rotary_base(spec: RotarySpec, context: int) -> float:
    """The base of a model trained at `context`. Source: TECHNIQUES of #315's lineage, training at 2048 triggers it."""
    if spec.reference_context and context > spec.reference_context and spec.dims > 2:
        return float(spec.base * (context / spec.reference_context) ** (spec.dims / (spec.dims - 2)))
    return spec.base


def rotation(start: int, length: int, dims: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles at positions start .. start+length−1: each (length, dims/2), in `like`'s dtype."""
    positions = torch.arange(start, start + length, dtype=torch.float64, device=like.device)
    exponents = torch.arange(0, dims, 2, dtype=torch.float64, device=like.device) / dims
    angles = positions[:, None] * base ** (-exponents)[None, :]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (..., positions, head) -> the same, its first 2·cos.shape[-1] dimensions turned. Norms are kept."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)
