"""Averages of the weights, kept in float32 (bf16 sums are catastrophic, #212).

EMA: a ← βa + (1−β)w every step (0.997 over 6,000 steps beat SWA by 0.003, #375; over a few hundred steps the memory
must be shorter). SWA: the mean of snapshots taken every `every` steps once the rates have fallen below `below`.
Which one replaces the weights is said beforehand, never chosen by a score.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AverageSpec:
    kind: Literal["none", "ema", "swa"] = "ema"
    decay: float = 0.997  # β of the EMA, per step
    every: int = 50  # steps between SWA's snapshots
    below: float = 0.2  # rate scale under which SWA takes them


class Average:
    """The running average of a model's parameters."""

    def __init__(self, spec: AverageSpec, model: nn.Module) -> None:
        self.spec, self.count = spec, 0
        self.parameters = list(model.parameters())
        start = torch.zeros_like if spec.kind == "swa" else torch.clone
        self.shadow: list[Tensor] = [] if spec.kind == "none" else [start(p.detach()).float() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int, scale: float) -> None:
        """Takes in the weights after `step` (counted from 1)."""
        if self.spec.kind == "ema":
            torch._foreach_lerp_(self.shadow, [p.detach().float() for p in self.parameters], 1 - self.spec.decay)
            self.count += 1
        elif self.spec.kind == "swa" and scale < self.spec.below and step % self.spec.every == 0:
            torch._foreach_add_(self.shadow, [p.detach().float() for p in self.parameters])
            self.count += 1

    @torch.no_grad()
    def replace(self) -> bool:
        """Puts the average in the weights' place; False where there is none to put."""
        if self.count == 0:
            return False
        divisor = self.count if self.spec.kind == "swa" else 1
        for parameter, mean in zip(self.parameters, self.shadow, strict=True):
            parameter.copy_(mean / divisor)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for mine, saved in zip(self.shadow, state["shadow"], strict=True):
            mine.copy_(saved)
