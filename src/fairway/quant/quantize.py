"""Weights -> integers: the whole plan, tensor by tensor, each booked in the journal.

Every rank computes the same integers from the same averaged Hessians; the first one writes the file.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.base import slots
from fairway.base.clock import Stopwatch
from fairway.base.errors import ContractError, FairwayError
from fairway.base.journal import Run
from fairway.model import GPT, tags
from fairway.quant.grid import Quantized, Tensors, entropy, nearest_codes
from fairway.quant.observe import Hessians, gather
from fairway.quant.plan import GridSpec, QuantSpec, plan
from fairway.quant.pruning import small
from fairway.quant.rounding import Solution
from fairway.quant.scales import row_scales


@torch.no_grad()
def quantize(
    model: GPT, calibration: Iterable[Tensor], spec: QuantSpec, run: Run, hessians: Hessians | None = None
) -> Tensors:
    """The model as integers and float16, by parameter name.

    calibration: (B, T) int64 batches of training text, this rank's share; not read when `rounding` needs no Hessian or
    `hessians` are given. Books `calibration` (seconds, belongs to the training clock), `quant.<name>` for each tensor
    and `quant` for the whole.
    """
    planned = plan(model, spec)
    solved = _solved(model, planned, spec)
    if hessians is None:
        with Stopwatch() as watch:
            hessians = calibrate(model, calibration, spec, run)
        run.fact("calibration", seconds=round(watch.seconds, 3), matrices=len(hessians))
    tensors: Tensors = {}
    with Stopwatch() as watch, run.meter("quantize", sum(p.numel() for p in model.parameters()), "weights") as meter:
        done = 0
        for name, parameter in model.named_parameters():
            weight, grid = parameter.detach(), planned[name]
            if not bool(torch.isfinite(weight).all()):
                raise FairwayError(f"{name}: a weight is not finite; go back to a checkpoint before the divergence")
            if name in hessians and hessians[name].shape != (weight.shape[1], weight.shape[1]):
                raise ContractError(f"{name}: its Hessian is {tuple(hessians[name].shape)}; calibrate this model")
            if grid is None:
                tensors[name] = _float16(name, weight)
            else:
                rounding = spec.rounding if name in solved else None
                tensors[name], facts = quantize_tensor(name, weight, grid, spec, rounding, hessians.get(name))
                run.fact(f"quant.{name}", **facts)
            done += weight.numel()
            meter.update(done)
    run.fact("quant", seconds=round(watch.seconds, 3), **_summary(tensors, run))
    return tensors


def calibrate(model: GPT, calibration: Iterable[Tensor], spec: QuantSpec, run: Run) -> Hessians:
    """The Hessians that the plan needs, none where its rounding does without. calibration: (B, T) int64 batches of
    training text, this rank's share."""
    if not slots.module_of(spec.rounding).NEEDS_HESSIAN:
        return {}
    return gather(model, calibration, _solved(model, plan(model, spec), spec), run, spec.calibration_sequences)


def quantize_tensor(
    name: str, weight: Tensor, grid: GridSpec, spec: QuantSpec, rounding: Any | None, hessian: Tensor | None
) -> tuple[Quantized, dict[str, Any]]:
    """One matrix or table on its grid, and its facts. rounding: the Spec of a solver; None: round to nearest."""
    watch = Stopwatch().start()
    weight = weight.float()
    if spec.prune.when == "before":
        weight = weight.masked_fill(small(weight, spec.prune.fraction), 0.0)
    scales = row_scales(weight, grid.bits, grid.scale)
    if not bool(torch.isfinite(scales).all()):
        raise FairwayError(f"{name}: weights of {float(weight.abs().max()):g} exceed float16 scales; train with decay")
    step = scales.float()[:, None]
    nearest = nearest_codes(weight, scales, grid.bits)
    solution = Solution(nearest.to(torch.int8), {})
    if rounding is not None:
        solution = _solve(weight, scales, grid.bits, hessian, rounding)
    codes = solution.codes
    if spec.prune.when == "after":
        codes = codes.masked_fill(small(codes * step, spec.prune.fraction), 0)
    facts: dict[str, Any] = {"bits": grid.bits, "rounding": "nearest" if rounding is None else slots.kind_of(rounding)}
    if hessian is not None:
        facts["objective"] = objective(weight, codes * step, hessian)
        facts["objective_nearest"] = objective(weight, nearest * step, hessian)
    integers = Quantized(codes.cpu().numpy(), scales.cpu().numpy(), grid.bits)
    facts |= {"entropy": round(entropy(integers.codes), 4), "zeros": round(float((integers.codes == 0).mean()), 4)}
    return integers, facts | solution.facts | {"seconds": round(watch.stop(), 4)}


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


def _solved(model: GPT, planned: dict[str, GridSpec | None], spec: QuantSpec) -> list[str]:
    """The tensors that `spec.rounding` rounds; the others on a grid, the tables, are rounded to nearest."""
    return [
        name
        for name, tag in tags(model).items()
        if planned[name] is not None and (tag.role == "matrix" or (tag.part == "embedding" and spec.embedding_hessian))
    ]


def _solve(weight: Tensor, scales: Tensor, bits: int, hessian: Tensor | None, rounding: Any) -> Solution:
    solution: Solution = slots.module_of(rounding).solve(weight, scales, bits, hessian, rounding)
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
