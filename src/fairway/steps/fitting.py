"""Weights and Hessians -> the integers that fit a byte budget, and the plan that makes them again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fairway.artifact import Sealed
from fairway.artifact.fit import Choices, Curve, Fitted, Written, allocate, fit, largest, least
from fairway.artifact.header import GroupHeader
from fairway.base.clock import Stopwatch
from fairway.base.errors import ContractError, RecipeError
from fairway.base.journal import Run
from fairway.base.slots import kind_of
from fairway.model import GPT, Tag, tags
from fairway.quant import (
    Hessians,
    Override,
    Quantized,
    QuantSpec,
    RepairSpec,
    ScaleSpec,
    Tensors,
    entropy,
    factored,
    objective,
    plan,
    quantize,
)
from fairway.quant.grid import LEAST_BITS, MOST_BITS
from fairway.quant.grid import largest as largest_code
from fairway.quant.parallel import side_by_side
from fairway.quant.plan import FLOAT16
from fairway.quant.repair import repaired
from fairway.quant.tradeoff import Tradeoff, kappa, tradeoff

HEADROOM = 1.25  # of the largest weight: GPTQ moves weights by the errors of those before them
FRAME, LINE = 700, 15  # bytes of the file's frame, and of each tensor's line and scales, until one is written
MOST_REPAIRED = 3  # matrices, as #1797 had it


@dataclass(frozen=True, eq=False)
class Solution:
    """A tensor as it was solved. damage: nats per token."""

    value: Quantized
    entropy_bytes: float
    damage: float


class Point(NamedTuple):
    """Of the trade-off: bytes foretold, damage expected in nats per token, the choices."""

    bytes: float
    damage: float
    choices: Choices


@dataclass(frozen=True, eq=False)
class Fit:
    """What came of it. spec: the plan as a recipe says it, without the fit; points: the trade-off, by rising bytes."""

    spec: QuantSpec
    tensors: Tensors
    sealed: Sealed
    found: Fitted[Solution]
    points: list[Point]
    tags: dict[str, Tag]
    seconds: float

    def plain(self) -> dict[str, Any]:
        """For `--json` and the journal."""
        found, repair = self.found, self.spec.repair
        values = {name: value for name, value in self.tensors.items() if isinstance(value, Quantized)}
        return {
            "artifact_bytes": found.bytes,
            "budget": found.budget,
            "used_percent": round(100 * found.bytes / found.budget, 4),
            "landed": found.landed,
            "damage": found.damage,
            "damage_expected": sum(choice.damage for choice in found.choices.values()),
            "foretold_bytes": round(found.foretold),
            "largest_useful_bytes": round(found.largest),
            "writings": found.writings,
            "solves": found.solves,
            "seconds": round(self.seconds, 3),
            "repaired": repair.count if repair.kind != "none" else 0,
            "choices": [
                {
                    "tensor": name,
                    "part": override.parts[0],
                    "layer": self.tags[name].layer,
                    "bits": override.bits,
                    "k": override.scale.k if override.scale else None,
                    "dead_zone": override.dead_zone,
                    "bits_per_weight": round(8 * found.solved[name].entropy_bytes / values[name].codes.size, 4),
                    "damage": found.solved[name].damage,
                }
                for name, override in zip(found.choices, self.spec.override[-len(found.choices) :], strict=True)
            ],
        }


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained model that is to be fitted, and what is known of its tensors."""

    model: GPT
    spec: QuantSpec
    hessians: Hessians
    tags: dict[str, Tag]
    known: dict[str, Tradeoff]

    @classmethod
    def of(cls, model: GPT, spec: QuantSpec, hessians: Hessians, run: Run) -> "Subject":
        """Looks at every tensor that `spec` quantises; what it keeps in float16 stays so. RecipeError for a rounding
        that is not foretold here; ContractError where a recipe cannot tell two tensors apart."""
        if kind_of(spec.rounding) != "gptq":
            raise RecipeError(f'quant.rounding = "{kind_of(spec.rounding)}": a fit rounds by gptq; take it, or no fit')
        found, planned = tags(model), plan(model, spec)
        head = any(found[name].part == "embedding" for name in hessians)
        rounding, float16 = spec.rounding, [tag for name, tag in found.items() if planned[name] is None]
        spec = QuantSpec(  # neither pruning nor repair by hand: dead zones and the price of a byte take their place
            override=tuple(_kept(tag) for tag in float16 if tag.role in ("matrix", "table")),
            rounding=rounding,
            embedding_hessian=head,
            passthrough_elements=spec.passthrough_elements,
            calibration=spec.calibration,
            calibration_sequences=spec.calibration_sequences,
            calibration_batch=spec.calibration_batch,
        )
        weights = {name: p.detach() for name, p in model.named_parameters() if planned[name] is not None}
        if not weights:
            raise RecipeError("quant: every tensor stays float16; a fit has no grid to choose: put some on one")
        if len({(found[name].part, found[name].layer) for name in weights}) < len(weights):
            raise ContractError("fit: two tensors of one part and layer; give each a part of its own")

        def one(name: str) -> Tradeoff:
            hessian = hessians.get(name)
            factor = None if hessian is None else factored(hessian, rounding)
            return tradeoff(found[name], weights[name], hessian, factor)

        known: dict[str, Tradeoff] = {}
        with run.meter("weigh grids", sum(w.numel() for w in weights.values()), "weights") as meter:
            for name, seen in zip(weights, side_by_side(one, weights), strict=True):
                known[name] = seen
                meter.update(sum(one.count for one in known.values()))
        return cls(model, spec, hessians, found, known)

    def curves(self) -> dict[str, Curve]:
        return {
            name: Curve(known.steps, known.dead_zones, known.bits * known.count / 8, known.damage)
            for name, known in self.known.items()
        }

    def plan(self, choices: Choices) -> QuantSpec:
        """The choices as a recipe says them: one override for each part of each layer, a part on one bit width."""
        widths: dict[str, int] = {}
        for name, choice in choices.items():
            steps, part = HEADROOM * self.known[name].largest / choice.step, self.tags[name].part
            wanted = next((b for b in range(LEAST_BITS, MOST_BITS) if largest_code(b) >= steps), MOST_BITS)
            widths[part] = max(widths.get(part, LEAST_BITS), wanted)
        fitted = (self._override(name, choices, widths) for name in choices)
        return replace(self.spec, override=(*self.spec.override, *fitted))

    def _override(self, name: str, choices: Choices, widths: dict[str, int]) -> Override:
        tag, choice = self.tags[name], choices[name]
        bits = widths[tag.part]
        clip = ScaleSpec("absolute", k=round(choice.step * largest_code(bits) / self.known[name].rms, 5))
        return Override(
            (tag.part,), None if tag.layer is None else (tag.layer, tag.layer), bits, clip, choice.dead_zone
        )

    def solve(self, choices: Choices, price: float, run: Run) -> tuple[QuantSpec, Tensors, dict[str, Solution]]:
        """Rounds everything. price: nats per token for a byte; repair is added where it pays."""
        spec, quiet = self.plan(choices), Run(ranks=run.ranks, quiet=run.quiet)
        tensors = quantize(self.model, self.hessians, spec, quiet)
        solved = self._solutions(tensors)
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        for count in range(1, min(MOST_REPAIRED, len(self.hessians.keys() & self.known.keys())) + 1):
            wanted = RepairSpec("lqer", count=count)
            amended = repaired(tensors, weights, self.hessians, wanted)
            known = self._solutions(amended)
            saved = sum(one.damage for one in solved.values()) - sum(one.damage for one in known.values())
            if saved <= price * (_repair_bytes(amended) - _repair_bytes(tensors)):
                break
            spec, tensors, solved = replace(spec, repair=wanted), amended, known
        return spec, tensors, solved

    def _solutions(self, tensors: Tensors) -> dict[str, Solution]:
        weights = dict(self.model.named_parameters())

        def one(name: str) -> Solution:
            value, weight, hessian = tensors[name], weights[name].detach(), self.hessians.get(name)
            assert isinstance(value, Quantized)
            rounded = torch.from_numpy(value.dequantize()).to(weight.device)
            harm = (
                float((weight.double() - rounded.double()).square().sum())
                if hessian is None
                else objective(weight, rounded, hessian)
            )
            size = entropy(value.codes) * value.codes.size / 8
            return Solution(value, size, kappa(self.tags[name], weight, hessian) * harm)

        return dict(zip(self.known, side_by_side(one, self.known), strict=True))


def fit_to(
    subject: Subject,
    budget: int,
    tokenizer: int,
    write: Callable[[Tensors], Sealed],
    run: Run,
    points: int = 12,
    beside: int = 0,
) -> Fit:
    """The plan of least expected damage whose file, as `write` weighs it, lands below the budget.

    tokenizer: bytes that it takes in the file, about; write: each file to a place of its own; points: how many of the
    trade-off are worked out; beside: bytes of code that messages count too. BudgetError where nothing fits.
    """
    watch = Stopwatch().start()
    made: tuple[QuantSpec, Tensors] = (subject.spec, {})
    kept: list[tuple[Sealed, QuantSpec, Tensors]] = []

    def solve(choices: Choices, price: float) -> dict[str, Solution]:
        nonlocal made
        spec, tensors, solved = subject.solve(choices, price, run)
        made = spec, tensors
        return solved

    def weigh(solved: dict[str, Solution]) -> Written:
        sealed = write(made[1])
        kept.append((sealed, *made))
        group = {name: GroupHeader(subject.tags[name].part, one.value.bits, ()).section for name, one in solved.items()}
        return Written(sealed.bytes, {section: sealed.sections[section] for section in set(group.values())}, group)

    curves, numbers = subject.curves(), sum(p.numel() for p in subject.model.parameters())
    plain = numbers - sum(one.count for one in subject.known.values())  # stay float16
    rest = FRAME + LINE * len(curves) + tokenizer + 2 * plain
    found = fit(budget, curves, rest, solve, weigh, run.say, beside)
    sealed, spec, tensors = kept[found.file - 1]
    return Fit(spec, tensors, sealed, found, list(_points(curves, found, points)), subject.tags, watch.stop())


def _points(curves: dict[str, Curve], found: Fitted[Solution], count: int) -> Iterator[Point]:
    """The trade-off from the coarsest to the finest grids, and the fitted choices among them; bytes by what the last
    file taught."""
    finer = {name: curve.finer() for name, curve in curves.items()}
    told = sum(one.entropy_bytes for one in found.solved.values())
    per_byte = (found.bytes - found.rest) / told
    smallest, top = least(finer), largest(finer)
    for i in range(count):
        wanted = smallest * 1.05 * (top / smallest / 1.05) ** (i / (count - 1))
        choices, _ = allocate(finer, wanted)
        size = found.rest + per_byte * sum(choice.bytes for choice in choices.values())
        yield Point(size, sum(choice.damage for choice in choices.values()), choices)


def _kept(tag: Tag) -> Override:
    """A tensor that stays float16, as a recipe says it."""
    return Override((tag.part,), None if tag.layer is None else (tag.layer, tag.layer), FLOAT16)


def _repair_bytes(tensors: Tensors) -> float:
    """What the addends weigh, by the bits of their grids and their scales."""
    found = [value.repair for value in tensors.values() if isinstance(value, Quantized) and value.repair is not None]
    return sum(one.left.size / 4 + one.right.size / 2 + 2 * one.right_scales.size + 2 for one in found)
