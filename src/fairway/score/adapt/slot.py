"""Context-only SLOT: a shift of the hidden vectors for every window, fitted to what the window has already paid for.

δ = 0 of shape (1, 1, d), one for each window; n AdamW steps on the mean of −ln p(target) over the window's context
positions, p = softmax of the logits of (hidden + δ); then the window's scored positions are read with their hidden
vectors + δ, and δ is forgotten. The targets of the context positions are all paid before the window's first scored
position, so nothing is learned from what is being scored.

Source: #1217 and #1306, whose one δ served 32 consecutive windows: a later window's context held the targets of an
earlier one, which was no honest score. They report 1.0924 → 1.0841 bits per byte (#1306's log) with that leak. With a δ
of its own for each window, pocket gained 0.0072: 1.7512 → 1.7440 on 28,570 targets, for three times the seconds.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.base.ranks import Ranks
from fairway.score.predictor import Adapter as Base
from fairway.score.predictor import Network

# Elements of one block of logits in the fit: 67 MB in float32, and about three times that while its gradient is taken.
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Spec:
    """The values of the context-only entries (#1306); steps and rate as in SLOT (5 to 8 steps of 0.003 to 0.005)."""

    steps: int = 8  # of AdamW, for each window
    lr: float = 0.005  # per step
    betas: tuple[float, float] = (0.3, 0.9)
    eps: float = 1e-5
    weight_decay: float = 1e-8  # decoupled

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: at least 1 is needed")
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: 0 or more is needed")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {self.betas}: each is at least 0 and below 1")

    @property
    def chunk(self) -> int:
        """Nothing is learned between units."""
        return 0


def shift(model: Network, hidden: Tensor, targets: Tensor, spec: Spec) -> Tensor:
    """hidden: (n, C, d) and targets: (n, C) int64 of n windows -> δ (n, 1, d), each window's fitted to itself alone.

    The sum over windows of each one's mean loss has, in each δ, the gradient of that window's loss; AdamW goes element
    by element, so that windows never mix. The model takes no gradient.
    """
    fixed = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
    delta = torch.zeros_like(fixed[:, :1]).requires_grad_()
    optimizer = torch.optim.AdamW([delta], spec.lr, spec.betas, spec.eps, spec.weight_decay)
    for _ in range(spec.steps):
        with torch.enable_grad():
            logits = model.logits(fixed + delta)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum") / targets.shape[1]
            (delta.grad,) = torch.autograd.grad(loss, delta)
        optimizer.step()
    return delta.detach()


class Adapter(Base):
    """Shifts each window by what its own context says; between units it learns nothing."""

    def __init__(self, model: Network, spec: Spec, chunks: int, ranks: Ranks) -> None:
        self.model, self.spec = model, spec

    def correct(self, hidden: Tensor, targets: Tensor) -> Tensor | None:
        """What is added to the hidden vectors of the scored positions of n windows: (n, 1, d).

        hidden: (n, C, d) of their context positions; targets: (n, C) int64, all paid. None where C = 0.
        """
        windows, context = targets.shape
        if not windows or not context:
            return None
        rows = max(1, _BLOCK_ELEMENTS // (context * self.model.vocab))
        parts = range(0, windows, rows)
        return torch.cat([shift(self.model, hidden[i : i + rows], targets[i : i + rows], self.spec) for i in parts])
