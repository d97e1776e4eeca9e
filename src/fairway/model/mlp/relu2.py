"""Squared ReLU (Primer, arXiv 2109.08668): W_down relu(W_up z)². What the reference really runs,
whatever its README says."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fairway.model.linear import Linear


@dataclass(frozen=True)
class Spec:
    pass


def relu2(p: Tensor) -> Tensor:
    """p: any shape; derivative 2p for p > 0, else 0."""
    return F.relu(p).square()


class Technique(nn.Module):
    """z: (..., width) -> (..., width)"""

    def __init__(self, spec: Spec, width: int, hidden: int, layer: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden, "up", layer)
        self.down = Linear(hidden, width, "down", layer)

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.down(relu2(self.up(z)))
        return y
