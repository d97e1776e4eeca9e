"""Parallel Muon (#399): Muon's step, with the matrices shared out over the ranks (distribution B of the reference).

Equal shapes make a bank, a stack of whole matrices, the largest bank first:

    gradients (n, rows, columns), zeros up to a multiple of the world's size → reduce-scatter: the sum of each matrix's
    gradient is on one rank → clip by the norm of all → momentum there → Newton–Schulz there → all-gather of the
    updates, while the next bank is orthogonalised → W ← W(1 − lr·wd) − lr·sqrt(max(1, rows/columns))·O on every rank.

Its result is `muon`'s; a rank keeps a world-th of the momentum. 85 → 83.3 ms a step on eight GPUs and ±0 bpb, as
published; not measured here. Traps of the study's run: its banks were matrices laid one under the other, so that the
reduce-scatter cut *rows* and Newton–Schulz saw eighths of matrices, which is another step; and it clipped gradients
that were not yet summed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from fairway.base.ranks import Pending, Ranks
from fairway.train.orthogonal import coefficients_of, newton_schulz, rising


@dataclass(frozen=True)
class Spec:
    """As `muon`'s, and how the momentum is kept."""

    lr: float = 0.025  # of the spectral norm, per step
    momentum: float = 0.99
    momentum_start: float = 0.92  # rises linearly to `momentum`
    momentum_warmup: int = 1500  # steps of that rise
    weight_decay: float = 0.04  # 1/step, in units of lr
    nesterov: bool = True
    row_norm: bool = False  # divide each row of u by its norm (clamped at 1e-7) before NS
    coefficients: Literal["quintic", "polar_express"] = "quintic"
    narrow_momentum: bool = False  # in bf16, as the reference; else in the parameters' own dtype


@dataclass
class Bank:
    """Parameters of equal shape; of the matrices of a step each rank owns as many, the last ranks fewer."""

    parameters: list[Parameter]
    given: list[Parameter] = field(default_factory=list)  # that take part in this step
    mine: list[Parameter] = field(default_factory=list)  # of those, this rank's
    coming: Pending | None = None
    gradients: list[Tensor] = field(default_factory=list)  # of `mine`, summed over the ranks


class ParallelMuon(torch.optim.Optimizer):
    """`step` after `reduce`, and between them whoever clips; without it, `step` reduces first."""

    def __init__(self, parameters: Iterable[Parameter], spec: Spec, ranks: Ranks) -> None:
        super().__init__(list(parameters), {"lr": spec.lr, "steps": 0})
        self.spec, self.ranks = spec, ranks
        by_shape: dict[tuple[int, ...], Bank] = {}
        for parameter in self.param_groups[0]["params"]:
            by_shape.setdefault(tuple(parameter.shape), Bank([])).parameters.append(parameter)
        self.banks = sorted(by_shape.values(), key=lambda bank: -sum(p.numel() for p in bank.parameters))

    @torch.no_grad()
    def reduce(self) -> None:
        """Starts to sum the gradients over the ranks, and takes them off the parameters. With several ranks a missing
        one counts as zero, as everywhere; on one, its parameter stays as it is."""
        for bank in self.banks:
            several = self.ranks.world > 1
            bank.given = [p for p in bank.parameters if several or p.grad is not None]
            bank.mine = self._owned(bank.given)
            if bank.given:
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bank.given]
                count = self._each(bank.given) * self.ranks.world
                bank.coming = self.ranks.reduce_scatter(stacked(grads, count, grads[0]))
            for parameter in bank.given:
                parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The summed gradients of this rank's matrices, to be scaled in place."""
        for bank in self.banks:
            if bank.coming is not None:
                bank.gradients = list(bank.coming.wait()[: len(bank.mine)])
                bank.coming = None
        return [gradient for bank in self.banks for gradient in bank.gradients]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not any(bank.given for bank in self.banks):
            self.reduce()
        self.gradients()
        coming: list[tuple[Bank, Pending]] = []
        for bank in self.banks:
            if bank.given:
                coming.append((bank, self.ranks.all_gather(self._updates(bank))))
        for bank, updates in coming:
            self._apply(bank, updates.wait())
        self.param_groups[0]["steps"] += 1

    def state_dict(self) -> dict[str, Any]:
        """The whole state, laid out as `muon`'s: any rank's is enough, and any number of ranks goes on from it. All
        ranks call this together."""
        whole = super().state_dict()
        group = self.param_groups[0]
        if self.ranks.world == 1 or not group["steps"]:
            return whole
        places = {id(parameter): place for place, parameter in enumerate(group["params"])}
        for bank in self.banks:
            mine = [self._momentum(p) for p in self._owned(bank.parameters)]
            stack = stacked(mine, self._each(bank.parameters), self._blank(bank.parameters[0]))
            momenta = self.ranks.all_gather(stack).wait()
            for parameter, momentum in zip(bank.parameters, momenta, strict=False):  # zeros fill the last rank's part
                whole["state"][places[id(parameter)]] = {"momentum": momentum}
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes this rank's part of a whole state."""
        super().load_state_dict(state_dict)
        for bank in self.banks:
            mine = {id(parameter) for parameter in self._owned(bank.parameters)}
            for parameter in bank.parameters:
                saved = self.state.pop(parameter, {}).get("momentum")
                if saved is not None and id(parameter) in mine:
                    # A copy: what was saved is a view of its whole bank, which would stay in memory.
                    self.state[parameter]["momentum"] = saved.to(self._blank(parameter).dtype, copy=True)

    def _updates(self, bank: Bank) -> Tensor:
        """This rank's part of a bank's updates, (each, rows, columns); zeros after its own."""
        spec, gradients = self.spec, bank.gradients
        momentum = rising(spec.momentum_start, spec.momentum, spec.momentum_warmup, self.param_groups[0]["steps"])
        buffers = [self._momentum(parameter) for parameter in bank.mine]
        if buffers:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
        ahead = [g + momentum * b for g, b in zip(gradients, buffers, strict=True)] if spec.nesterov else buffers
        stack = stacked(ahead, self._each(bank.given), bank.given[0])
        if spec.row_norm:
            stack = stack / stack.norm(dim=-1, keepdim=True).clamp_min(1e-7)
        if stack.is_cuda:
            stack = stack.bfloat16()
        if ahead:
            stack[: len(ahead)] = newton_schulz(stack[: len(ahead)], coefficients_of(spec.coefficients))
        return stack

    def _apply(self, bank: Bank, updates: Tensor) -> None:
        """updates: (n or more, rows, columns), in the order of the bank's parameters."""
        (rows, columns), lr = bank.given[0].shape, self.param_groups[0]["lr"]
        given: list[Tensor] = [*bank.given]
        moves = list(updates[: len(given)].to(given[0].dtype))
        torch._foreach_mul_(given, 1 - lr * self.spec.weight_decay)
        torch._foreach_add_(given, moves, alpha=-lr * math.sqrt(max(1.0, rows / columns)))
        bank.given, bank.gradients = [], []

    def _momentum(self, parameter: Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(self._blank(parameter))
        buffer: Tensor = state["momentum"]
        return buffer

    def _blank(self, parameter: Parameter) -> Tensor:
        """A tensor without values, of the shape and type that a momentum has."""
        return torch.empty_like(parameter, dtype=torch.bfloat16 if self.spec.narrow_momentum else None)

    def _each(self, parameters: list[Parameter]) -> int:
        """How many matrices a rank's part of a stack holds, zeros among them."""
        return -(-len(parameters) // self.ranks.world)

    def _owned(self, parameters: list[Parameter]) -> list[Parameter]:
        each = self._each(parameters)
        return parameters[self.ranks.rank * each : (self.ranks.rank + 1) * each]


def stacked(matrices: list[Tensor], count: int, like: Tensor) -> Tensor:
    """(count, rows, columns): the matrices, zeros after them, of the type of `like`."""
    stack = torch.zeros(count, *like.shape, dtype=like.dtype, device=like.device)
    for place, matrix in zip(stack, matrices, strict=False):
        place.copy_(matrix)
    return stack


def build(spec: Spec, parameters: Iterable[Parameter], ranks: Ranks) -> torch.optim.Optimizer:
    """Each rank holds the momentum of its own matrices alone."""
    return ParallelMuon(parameters, spec, ranks)
