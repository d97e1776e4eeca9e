"""Star-ReLU (arXiv 2210.13452; GEPA, #462): W_down (s ⊙ relu(W_up z)² + b), s and b learned, one per hidden unit.
No gate branch, although its authors call it SwiGLU."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.model.linear import Linear


@dataclass(frozen=True)
class Spec:
    pass


def star_relu(p: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """p: (..., hidden), scale and bias: (hidden,)"""
    return scale * F.relu(p).square() + bias


class Technique(nn.Module):
    """z: (..., width) -> (..., width)"""

    def __init__(self, spec: Spec, width: int, hidden: int, layer: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden, "up", layer)
        self.down = Linear(hidden, width, "down", layer)
        self.scale = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.tagged = {"scale": ("gain", "star_scale"), "bias": ("gain", "star_bias")}
        self.layer = layer

    def forward(self, z: Tensor) -> Tensor:
        p = self.up(z)
        y: Tensor = self.down(star_relu(p, self.scale.to(p.dtype), self.bias.to(p.dtype)))
        return y
