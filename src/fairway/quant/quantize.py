"""Weights -> integers: the whole plan, tensor by tensor, each booked in the journal.

Every rank computes the same integers from the same averaged Hessians; the first one writes the file.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.base import slots
from fairway.base.clock import Stopwatch
from fairway.base.errors import ContractError, FairwayError
from fairway.base.journal import Run
from fairway.model import GPT, tags
from fairway.quant.grid import Passthrough, Quantized, Tensors, entropy, nearest_codes
from fairway.quant.observe import Hessians
from fairway.quant.parallel import side_by_side
from fairway.quant.plan import GridSpec, QuantSpec, needs_hessians, plan, shaped
from fairway.quant.pruning import ones, rankable, selective, small
from fairway.quant.rounding import Solution, nearest
from fairway.quant.scales import row_scales


@torch.no_grad()
def quantize(model: GPT, hessians: Hessians, spec: QuantSpec, run: Run) -> Tensors:
    """The model as integers and float16, by parameter name.

    hessians: of all that is `observed`, from a source of the slot quant/calibration. Books `quant.<name>` for each
    tensor and `quant` for the whole.
    """
    planned = plan(model, spec)
    solved = _solved(model, planned, spec)

    def one(item: tuple[str, Tensor]) -> tuple[Quantized | Passthrough, dict[str, Any]]:
        name, weight = item[0], item[1].detach()
        grid, hessian = planned[name], hessians.get(name)
        if not bool(torch.isfinite(weight).all()):
            raise FairwayError(f"{name}: a weight is not finite; go back to a checkpoint before the divergence")
        if hessian is not None and hessian.shape != (weight.shape[1], weight.shape[1]):
            raise ContractError(f"{name}: its Hessian is {tuple(hessian.shape)}; calibrate this model")
        if grid is None:
            return _float16(name, weight), {}
        return quantize_tensor(name, weight, grid, spec, spec.rounding if name in solved else None, hessian)

    tensors: Tensors = {}
    facts: dict[str, dict[str, Any]] = {}
    with Stopwatch() as watch, run.meter("quantize", sum(p.numel() for p in model.parameters()), "weights") as meter:
        done, named = 0, list(model.named_parameters())
        for (name, parameter), (value, told) in zip(named, side_by_side(one, named), strict=True):
            tensors[name], facts[name] = value, told
            done += parameter.numel()
            meter.update(done)
        tensors = _finished(tensors, dict(named), hessians, spec, facts)
    for name, value in tensors.items():
        if isinstance(value, Quantized):
            run.fact(f"quant.{name}", **facts[name])
    run.fact("quant", seconds=round(watch.seconds, 3), **_summary(tensors, run))
    return tensors


def observed(model: GPT, spec: QuantSpec) -> list[str]:
    """What Hessians are gathered of: all that is on a grid and has inputs; nothing where the plan does without. The
    head's too: a later fit, and repair, are better for it."""
    found = _solved(model, plan(model, spec), replace(spec, embedding_hessian=True))
    return found if needs_hessians(spec) else []


def quantize_tensor(
    name: str,
    weight: Tensor,
    grid: GridSpec,
    spec: QuantSpec,
    rounding: Any | None,
    hessian: Tensor | None,
    factor: Any | None = None,
) -> tuple[Quantized, dict[str, Any]]:
    """One matrix or table on its grid, and its facts.

    rounding: the Spec of a solver; None: round to nearest. factor: what `factored` made of this Hessian for this
    rounding, where several grids are tried.
    """
    if shaped(grid):
        found: tuple[Quantized, dict[str, Any]] = slots.optional("fairway.quant.books").shaped(
            name, weight, grid, spec, rounding, hessian
        )
        return found
    watch = Stopwatch().start()
    trained = weight = weight.float()
    if spec.prune.when == "before":
        weight = weight.masked_fill(small(weight, spec.prune.fraction), 0.0)
    scales = row_scales(weight, grid.bits, grid.scale, hessian)
    if not bool(torch.isfinite(scales).all()):
        raise FairwayError(f"{name}: weights of {float(weight.abs().max()):g} exceed float16 scales; train with decay")
    step = scales.float()[:, None]
    plain = nearest_codes(weight, scales, grid.bits)
    solver, known = rounding or nearest.Spec(), hessian if factor is None else factor
    solution = _solve(weight, scales, grid, known, solver)
    codes = solution.codes
    if spec.prune.when == "after":
        codes = codes.masked_fill(small(codes * step, spec.prune.fraction), 0)
    facts: dict[str, Any] = {"bits": grid.bits, "rounding": slots.kind_of(solver)}
    integers = Quantized(codes.cpu().numpy(), scales.cpu().numpy(), grid.bits)
    facts |= _measured(trained, integers, hessian)
    if hessian is not None:
        facts["objective_nearest"] = objective(trained, plain * step, hessian)
    return integers, facts | solution.facts | {"seconds": round(watch.stop(), 4)}


def factored(hessian: Tensor, rounding: Any) -> Any:
    """What a solver may be given in the place of this Hessian, as often as wanted: its factor, where there is one."""
    factorise = getattr(slots.module_of(rounding), "factorise", None)
    return hessian if factorise is None else factorise(hessian, rounding)


def objective(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """tr((W−Ŵ) H (W−Ŵ)ᵀ), the mean squared error of the outputs.

    weight, rounded: (rows, cols); hessian: (cols, cols), undamped.
    """
    difference = weight.double() - rounded.double()
    return float((difference @ hessian.double() * difference).sum())


def dequantized(tensors: Tensors) -> dict[str, Tensor]:
    """What the file's weights will be, float32 by parameter name: for measuring, never for scoring."""
    return {
        name: torch.from_numpy(value.dequantize() if isinstance(value, Quantized) else value.astype(np.float32))
        for name, value in tensors.items()
    }


def _finished(
    tensors: Tensors, weights: dict[str, Tensor], hessians: Hessians, spec: QuantSpec, facts: dict[str, dict[str, Any]]
) -> Tensors:
    """What is done to all tensors together, once they are rounded: selective pruning, then repair.

    facts: of each tensor; changed where its integers are.
    """
    before = tensors
    if spec.prune.when == "selective":
        count = math.floor(spec.prune.fraction * ones(rankable(tensors, spec.prune.by, hessians)))
        tensors = selective(tensors, count, spec.prune.by, weights, hessians)
    if spec.repair.kind != "none":
        tensors = slots.optional("fairway.quant.repair").repaired(tensors, weights, hessians, spec.repair)
    for name, value in tensors.items():
        if isinstance(value, Quantized) and value is not before[name]:
            facts[name] |= _measured(weights[name].detach(), value, hessians.get(name))
            facts[name] |= {} if value.repair is None else {"repair_rank": len(value.repair.right)}
    return tensors


def _measured(weight: Tensor, value: Quantized, hessian: Tensor | None) -> dict[str, Any]:
    """What is true of the integers: their entropy and zeros, and what they cost against the trained weights."""
    facts = {"entropy": round(entropy(value.codes), 4), "zeros": round(float((value.codes == 0).mean()), 4)}
    if hessian is None:
        return facts
    rounded = torch.from_numpy(value.dequantize()).to(weight.device)
    return {"objective": objective(weight.float(), rounded, hessian), **facts}


def _solved(model: GPT, planned: dict[str, GridSpec | None], spec: QuantSpec) -> list[str]:
    """The tensors that `spec.rounding` rounds; the others on a grid, the tables, are rounded to nearest."""
    return [
        name
        for name, tag in tags(model).items()
        if planned[name] is not None and (tag.role == "matrix" or (tag.part == "embedding" and spec.embedding_hessian))
    ]


def _solve(weight: Tensor, scales: Tensor, grid: GridSpec, hessian: Any | None, rounding: Any) -> Solution:
    module = slots.module_of(rounding)
    solution: Solution = module.solve(weight, scales, grid.bits, hessian, rounding, grid.dead_zone)
    if solution.codes.shape != weight.shape or solution.codes.dtype != torch.int8:
        raise ContractError(
            f"rounding = {slots.kind_of(rounding)!r}: codes {tuple(solution.codes.shape)} {solution.codes.dtype} "
            f"instead of {tuple(weight.shape)} int8"
        )
    return solution


def _float16(name: str, weight: Tensor) -> np.ndarray[Any, np.dtype[np.float16]]:
    half = weight.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise FairwayError(f"{name}: {float(weight.abs().max()):g} exceeds float16; train with decay, or quantise it")
    values: np.ndarray[Any, np.dtype[np.float16]] = half.cpu().numpy()
    return values


def _summary(tensors: Tensors, run: Run) -> dict[str, Any]:
    """Sums over the model: how many weights, their entropy in bytes, the two objectives."""
    integers = {name: value for name, value in tensors.items() if isinstance(value, Quantized)}
    facts = [run.facts[f"quant.{name}"] for name in integers]
    return {
        "quantized": sum(value.codes.size for value in integers.values()),
        "float16": sum(value.size for value in tensors.values() if not isinstance(value, Quantized)),
        "entropy_bytes": round(sum(entropy(value.codes) * value.codes.size for value in integers.values()) / 8),
        "objective": sum(fact.get("objective", 0.0) for fact in facts),
        "objective_nearest": sum(fact.get("objective_nearest", 0.0) for fact in facts),
        "damping_raised": sum(1 for fact in facts if fact.get("damping_raised")),
    }
