"""SwiGLU (arXiv 2002.05202): W_down (silu(W_gate z) ⊙ W_up z). Three matrices: for equal parameters take 2/3 of the
hidden width."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fairway.model.linear import Linear


@dataclass(frozen=True)
class Spec:
    pass


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: (..., hidden) -> (..., hidden)"""
    return F.silu(gate) * up


class Technique(nn.Module):
    """z: (..., width) -> (..., width)"""

    def __init__(self, spec: Spec, width: int, hidden: int, layer: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, "gate", layer)
        self.up = Linear(width, hidden, "up", layer)
        self.down = Linear(hidden, width, "down", layer)

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.down(swiglu(self.gate(z), self.up(z)))
        return y
