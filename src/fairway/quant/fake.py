"""Quantisation-aware training: what the forward sees is the weight on its grid.

straight_through  ŵ = s · clip(round(w/s)); the forward uses ŵ, the gradient passes as if it were w
soft_round        round_α(y) = ⌊y⌋ + ½ + ½ tanh(α r)/tanh(α/2), r = y − ⌊y⌋ − ½ (#606): differentiable, and a staircase
                  as α grows from 1 to 16 over the warmdown

The switch is the plug itself, set between steps: a module whose plug changed is compiled anew. The reference read a
class attribute inside the compiled graph; the compiler folded it to "off", and its quantisation-aware training never
ran. α lives in a tensor, so that the compiled graph reads its present value.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fairway.base.errors import RecipeError
from fairway.model import GPT, Linear, projections
from fairway.quant.grid import largest, nearest_codes
from fairway.quant.plan import QuantSpec, plan, shaped
from fairway.quant.scales import ScaleSpec, row_scales

Plug = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FakeSpec:
    """When, and how, training sees quantised weights."""

    kind: Literal["off", "straight_through", "soft_round"] = "off"
    start: float = 0.5  # begins once the learning-rate factor is below it (0.5: #576; 0.15: #549); 1: from the start
    scale: ScaleSpec = field(default_factory=lambda: ScaleSpec(rule="fixed", percentile=0.9995))
    tables: bool = False  # also the tables, the tied head's included; the reference: matrices alone
    sharpest: float = 16.0  # soft_round's α when the factor reaches 0; it begins at 1

    def __post_init__(self) -> None:
        if not 0 < self.start <= 1:
            raise ValueError(f"start = {self.start}: a learning-rate factor in (0, 1] is needed")
        if self.scale.hessian_weight:
            raise ValueError(f"scale.hessian_weight = {self.scale.hessian_weight}: training has no Hessians; take 0")
        if not math.isfinite(self.sharpest) or self.sharpest < 1:
            raise ValueError(f"sharpest = {self.sharpest}: at least 1 is needed")


def straight_through(weight: Tensor, bits: int, scale: ScaleSpec) -> Tensor:
    """weight: (rows, cols) -> the same on its grid; the gradient is the identity."""
    return weight + (_on_grid(weight.detach(), bits, scale) - weight).detach()


def soft_round(weight: Tensor, bits: int, scale: ScaleSpec, alpha: Tensor) -> Tensor:
    """weight: (rows, cols); alpha: () > 0 -> the same, drawn to its grid; no gradient outside the clip."""
    limit = largest(bits)
    step = row_scales(weight.detach(), bits, scale).to(weight.dtype)[:, None]
    return torch.clamp(soft_staircase(weight / step, alpha), -limit, limit) * step


def soft_staircase(y: Tensor, alpha: Tensor) -> Tensor:
    """round_α of the module's docstring: y itself for α → 0, round(y) for α → ∞."""
    floor = torch.floor(y.detach())
    rest = y - floor - 0.5
    return floor + 0.5 + 0.5 * torch.tanh(alpha * rest) / torch.tanh(alpha / 2)


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) trains on the grid."""
    return bool(recipe["qat"]["kind"] != "off")


class FakeQuant:
    """Sets the plugs of a model as training goes on.

    `update(factor)` is called before each step with the learning-rate factor; it answers whether plugs changed, in
    which case a compiled model must be compiled again. `remove()` takes them off; weights keep their values.
    """

    def __init__(self, model: GPT, quant: QuantSpec, spec: FakeSpec) -> None:
        self.spec, self.active = spec, False
        grids = {name: grid for name, grid in plan(model, quant).items() if grid is not None}
        if any(map(shaped, grids.values())):
            raise RecipeError(
                f"qat.kind = {spec.kind!r}: training sees plain steps; take off, or quant's form = 'steps'"
            )
        owners = {name: owner for name, owner in projections(model).items() if name in grids}
        self._owners = {n: o for n, o in owners.items() if spec.tables or isinstance(o, Linear)}
        self._bits = {name: grids[name].bits for name in self._owners}
        self.alpha = torch.ones((), device=next(model.parameters()).device)

    def update(self, factor: float) -> bool:
        """factor: the learning rate's, from 1 down to 0 in the warmdown."""
        wanted = self.spec.kind != "off" and (factor < self.spec.start or self.spec.start >= 1)
        if wanted:
            progress = max(0.0, 1 - factor / self.spec.start)
            self.alpha.fill_(1 + (self.spec.sharpest - 1) * progress)
        changed = wanted != self.active
        if changed:
            for name, owner in self._owners.items():
                owner.fake_quant = self._plug(self._bits[name]) if wanted else None
            self.active = wanted
        return changed

    def remove(self) -> None:
        """Off, for averaging's evaluation, calibration and export."""
        for owner in self._owners.values():
            owner.fake_quant = None
        self.active = False

    def _plug(self, bits: int) -> Plug:
        scale, alpha = self.spec.scale, self.alpha
        if self.spec.kind == "straight_through":
            return lambda weight: straight_through(weight, bits, scale)
        return lambda weight: soft_round(weight, bits, scale, alpha)


def _on_grid(weight: Tensor, bits: int, scale: ScaleSpec) -> Tensor:
    scales = row_scales(weight, bits, scale)
    return nearest_codes(weight, scales, bits) * scales.to(weight.dtype)[:, None]
