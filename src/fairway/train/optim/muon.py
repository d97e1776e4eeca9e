"""Muon (K. Jordan, 2024): momentum, orthogonalised by a Newton–Schulz iteration, for matrices.

m ← μ m + g;  u = g + μ m (Nesterov);  O = NS(u);  W ← W(1 − lr·wd) − lr·sqrt(max(1, rows/columns))·O.

NS: train/orthogonal.py. Options: rows of u normalised before NS (MuonEq-R, arXiv 2603.28254, about −0.001 bpb), and the
five step-wise coefficient triples of Polar Express (arXiv 2505.16932). bf16 on CUDA; on a CPU in the parameters' own
dtype, since one 256×1024 matrix costs 0.95 CPU-s a step in bf16 there and 0.023 in float32.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fairway.base.ranks import Ranks
from fairway.train.orthogonal import coefficients_of, newton_schulz, rising


@dataclass(frozen=True)
class Spec:
    lr: float = 0.025  # of the spectral norm, per step
    momentum: float = 0.99
    momentum_start: float = 0.92  # rises linearly to `momentum`
    momentum_warmup: int = 1500  # steps of that rise
    weight_decay: float = 0.04  # 1/step, in units of lr
    nesterov: bool = True
    row_norm: bool = False  # divide each row of u by its norm (clamped at 1e-7) before NS
    coefficients: Literal["quintic", "polar_express"] = "quintic"


class Muon(torch.optim.Optimizer):
    """Equal shapes are stacked and orthogonalised in one batch; ranks share the batches and sum the results."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], spec: Spec, ranks: Ranks) -> None:
        super().__init__(list(parameters), {"lr": spec.lr, "steps": 0})
        self.spec, self.ranks = spec, ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            spec = self.spec
            momentum = rising(spec.momentum_start, spec.momentum, spec.momentum_warmup, group["steps"])
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = self._orthogonal([self._velocity(p, momentum) for p in parameters])
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                torch._foreach_mul_(parameters, 1 - group["lr"] * self.spec.weight_decay)
                torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype).unbind()), alpha=-rate)
            group["steps"] += 1

    def _velocity(self, parameter: Tensor, momentum: float) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum"]
        buffer.mul_(momentum).add_(gradient)
        update = gradient + momentum * buffer if self.spec.nesterov else buffer
        if self.spec.row_norm:
            update = update / update.norm(dim=1, keepdim=True).clamp_min(1e-7)
        return update

    def _orthogonal(self, updates: list[Tensor]) -> Tensor:
        """Orthogonalised updates, (count, rows, columns); each rank computes its share of the stack."""
        coefficients = coefficients_of(self.spec.coefficients)
        stack = torch.stack(updates)
        if stack.is_cuda:
            stack = stack.bfloat16()
        if self.ranks.world == 1:
            return newton_schulz(stack, coefficients)
        mine = self.ranks.share(len(updates))
        result = torch.zeros_like(stack)
        if mine.start < mine.stop:
            result[mine] = newton_schulz(stack[mine], coefficients)
        return self.ranks.sum_(result)


def build(spec: Spec, parameters: Iterable[torch.nn.Parameter], ranks: Ranks) -> torch.optim.Optimizer:
    """The momentum is the same on every rank, so that any rank's checkpoint is the whole state."""
    return Muon(parameters, spec, ranks)
