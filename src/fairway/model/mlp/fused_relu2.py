"""Squared ReLU by a kernel of its own: W_down relu2(W_up z), forward and backward one pass over the numbers each.

The same function, parameters and file as `relu2`; only the speed may differ. The study's run of it (#1237) said "no
speed-up", but its kernel was bypassed under torch.compile and never ran in training. Here it is an operator that the
compiler must call; the journal says how often it was launched, or why the plain twin below, which is the definition,
ran instead. Its speed is not measured: no GPU was at hand. Published for comparison: five fused variants without gain
(#1679), about 3 % from fusing into the matrix product itself (#1530).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.model.linear import Linear

try:
    from fairway.model.kernels.relu2 import launches, usable
    from fairway.model.kernels.relu2 import relu2 as kernel

    MISSING = ""
except ImportError as error:  # triton comes with torch's CUDA builds alone
    MISSING = str(error)


@dataclass(frozen=True)
class Spec:
    pass


def relu2(p: Tensor) -> Tensor:
    """The twin. p: any shape; derivative 2p for p > 0, else 0."""
    return F.relu(p).square()


def why_twin(device: torch.device) -> str:
    """Why the twin runs on a device; empty: the kernel does."""
    return MISSING or ("" if usable(device) else f"no kernel for {device.type}")


def report(fact: Callable[..., None], device: torch.device) -> None:
    """What ran, in the journal's words: fact(name, what=..., ...)."""
    if why := why_twin(device):
        fact("substitution", what="model.mlp = fused_relu2", why=f"{why}; its PyTorch twin")
    else:
        fact("kernel", what="model.mlp = fused_relu2", square=launches["square"], slope=launches["slope"])


class Technique(nn.Module):
    """z: (..., width) -> (..., width)"""

    def __init__(self, spec: Spec, width: int, hidden: int, layer: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden, "up", layer)
        self.down = Linear(hidden, width, "down", layer)

    def forward(self, z: Tensor) -> Tensor:
        p = self.up(z)
        y: Tensor = self.down(relu2(p) if why_twin(p.device) else kernel(p))
        return y
