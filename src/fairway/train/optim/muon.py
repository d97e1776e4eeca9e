"""Muon (K. Jordan, 2024): momentum, orthogonalised by a Newton–Schulz iteration, for matrices.

m ← μ m + g;  u = g + μ m (Nesterov);  O = NS(u);  W ← W(1 − lr·wd) − lr·sqrt(max(1, rows/columns))·O.

NS: X = u/‖u‖_F, wide side last; five times X ← aX + (bA + cA²)X with A = XXᵀ; the quintic pushes singular values into
about [0.7, 1.2]. Options: rows of u normalised before NS (MuonEq-R, arXiv 2603.28254, about −0.001 bpb), and the five
step-wise coefficient triples of Polar Express (arXiv 2505.16932). bf16 on CUDA; on a CPU in the parameters' own dtype,
since one 256×1024 matrix costs 0.95 CPU-s a step in bf16 there and 0.023 in float32.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fairway.base.ranks import Ranks

Coefficients = tuple[float, float, float]
QUINTIC: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


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


def newton_schulz(u: Tensor, coefficients: Iterable[Coefficients] = QUINTIC) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values of u are pushed towards 1.

    u: (..., rows, columns), any scale -> the same shape and dtype.
    """
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def momentum_at(spec: Spec, step: int) -> float:
    """The momentum of a step, counted from 0."""
    share = min(step / spec.momentum_warmup, 1.0) if spec.momentum_warmup else 1.0
    return spec.momentum_start + share * (spec.momentum - spec.momentum_start)


class Muon(torch.optim.Optimizer):
    """Equal shapes are stacked and orthogonalised in one batch; ranks share the batches and sum the results."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], spec: Spec, ranks: Ranks) -> None:
        super().__init__(list(parameters), {"lr": spec.lr, "steps": 0})
        self.spec, self.ranks = spec, ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            momentum = momentum_at(self.spec, group["steps"])
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
        coefficients = QUINTIC if self.spec.coefficients == "quintic" else POLAR_EXPRESS
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
