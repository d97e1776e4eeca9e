"""Codebooks and rotations on the way in: a matrix is rotated, then rounded to the levels of a Lloyd–Max quantiser.

The Lloyd–Max quantiser of the standard normal is the best of 2^b levels: each is the mean of its cell, and cells end
midway between levels (Max 1960, doi 10.1109/TIT.1960.1057548; Lloyd 1982). Its error on numbers of variance 1 is
0.1175, 0.03454, 0.009497, 0.002499 with 2, 3, 4, 5 bits, and a rotation makes every row such numbers, up to its scale,
the root mean square. A clip has no meaning here: `scale` is not read with a book.

Rounding by Hessian goes on in the rotated coordinates: with w' = Rw the inputs are x' = Rx, and H' = R H Rᵀ.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.base import slots
from fairway.base.clock import Stopwatch
from fairway.base.errors import ContractError, FairwayError, RecipeError
from fairway.quant import forms
from fairway.quant.forms import NONE, Form, Formed, block, rotated
from fairway.quant.grid import LEAST_SCALE, MOST_BITS, entropy, nearest_codes
from fairway.quant.plan import GridSpec, Override, QuantSpec
from fairway.quant.pruning import small
from fairway.quant.quantize import objective
from fairway.quant.rounding import Solution, nearest
from fairway.quant.scales import row_scales

SEED = 0  # of every rotation; a file says its own
BOOKS, ROTATED = ("lloyd_max", "turbo"), ("rotated", "turbo")  # forms
CENTROIDS, NEWTON = 300, 50  # rounds: Newton's method from further away leaves levels out of order
EXACT = 1e-9


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) has a codebook or a rotation."""
    return forms.wanted(recipe)


class Book:
    """Levels on a device. levels: (n,) positive, ascending; code ±k is ± the k-th of them."""

    def __init__(self, levels: Sequence[float], device: torch.device) -> None:
        half = torch.tensor(levels, dtype=torch.float64, device=device)
        self.edges = (half[1:] + half[:-1]) / 2
        self.table = torch.cat([-half.flip(0), half.new_zeros(1), half])

    def nearest(self, y: Tensor) -> Tensor:
        """y: weights in units of their scale, any shape -> codes, never 0, in y's dtype."""
        code = torch.bucketize(y.abs().double(), self.edges) + 1
        return torch.where(y < 0, -code, code).to(y.dtype)

    def values(self, codes: Tensor) -> Tensor:
        """The levels of codes, in their dtype."""
        return self.table[codes.long() + len(self.table) // 2].to(codes.dtype)


def check_spec(spec: QuantSpec) -> None:
    """ValueError where a plan asks a book or a rotation for what they do not do."""
    grids: tuple[GridSpec | Override, ...] = (spec.matrix, spec.table, *spec.override)
    form = next(grid.form for grid in grids if grid.form not in ("steps", None))
    rotated_ = any(grid.form in ROTATED for grid in grids)
    if spec.prune.when in ("after", "selective") or (spec.prune.when == "before" and rotated_):
        why = "a zero before a rotation is none after it" if rotated_ else "the size of codes is not that of weights"
        remedy = "never" if rotated_ else "before or never"
        raise ValueError(f"prune.when = {spec.prune.when!r}: with form = {form!r} {why}; take {remedy}")
    if spec.fit.budget or spec.prune.budget:
        raise ValueError(
            f"fit.budget = {spec.fit.budget}, prune.budget = {spec.prune.budget}: bytes are fitted by steps and zeros, "
            f"which form = {form!r} has not; take form = 'steps', or no budget"
        )
    known = slots.kind_of(spec.rounding) == "nearest" or getattr(slots.module_of(spec.rounding), "TAKES_BOOKS", False)
    if not known and any(grid.form in BOOKS for grid in grids):
        kind = slots.kind_of(spec.rounding)
        raise ValueError(f"rounding = {kind!r}: knows no levels; take gptq or nearest, or form = 'rotated'")


def check(name: str, grid: GridSpec, cols: int) -> None:
    """RecipeError where a tensor's own grid cannot be what it says."""
    if grid.form in ROTATED and block(cols) == 1:
        raise RecipeError(f"{name}: form = {grid.form!r}: {cols} columns cannot be rotated, an even number is needed")
    if grid.form not in BOOKS:
        return
    if grid.bits >= MOST_BITS:
        raise RecipeError(f"{name}: bits = {grid.bits}: form = {grid.form!r} takes {MOST_BITS - 1} at most")
    scale = grid.scale
    unread = {"dead_zone": grid.dead_zone, "scale.floor": scale.floor, "scale.hessian_weight": scale.hessian_weight}
    for key, value in unread.items():
        if value:
            raise RecipeError(f"{name}: {key} = {value}: form = {grid.form!r} has none; take 0")


def shaped(
    name: str, weight: Tensor, grid: GridSpec, spec: QuantSpec, rounding: Any | None, hessian: Tensor | None
) -> tuple[Formed, dict[str, Any]]:
    """`quantize_tensor` of a grid with a book, a rotation, or both."""
    watch = Stopwatch().start()
    trained = weight = weight.float()
    if spec.prune.when == "before":
        weight = weight.masked_fill(small(weight, spec.prune.fraction), 0.0)
    known, seed = hessian, NONE
    if grid.form in ROTATED:
        seed = SEED
        weight = turned(weight, seed)
        known = None if hessian is None else turned(turned(hessian, seed).T, seed)
    book, levels, bits = None, tuple[float, ...](), grid.bits
    if grid.form in BOOKS:
        levels, bits = lloyd_max(grid.bits), grid.bits + 1
        book = Book(levels, weight.device)
        scales = weight.square().mean(dim=1).sqrt().clamp(min=LEAST_SCALE).to(torch.float16)
    else:
        scales = row_scales(weight, bits, grid.scale, known)
    if not bool(torch.isfinite(scales).all()):
        raise FairwayError(f"{name}: weights of {float(weight.abs().max()):g} exceed float16 scales; train with decay")
    solution = _solve(weight, scales, grid, known, rounding, book)

    def made(codes: Tensor) -> Formed:
        integers = codes.to(torch.int8).cpu().numpy()
        return Formed(integers, scales.cpu().numpy(), bits, form=Form(seed, levels))

    def harm(value: Formed, hessian: Tensor) -> float:
        return objective(trained, torch.from_numpy(value.dequantize()).to(weight.device), hessian)

    integers = made(solution.codes)
    facts: dict[str, Any] = {"bits": grid.bits, "form": grid.form}
    facts["rounding"] = "nearest" if rounding is None else slots.kind_of(rounding)
    facts["entropy"] = round(entropy(integers.codes), 4)
    facts["zeros"] = round(float((integers.codes == 0).mean()), 4)
    if hessian is not None:
        facts["objective"] = harm(integers, hessian)
        facts["objective_nearest"] = harm(made(_nearest(weight, scales, bits, book)), hessian)
    return integers, facts | solution.facts | {"seconds": round(watch.stop(), 4)}


def turned(rows: Tensor, seed: int) -> Tensor:
    """`rotated`, of a tensor: (rows, cols), worked out in float64, in the tensor's own dtype."""
    return torch.from_numpy(rotated(rows.double().cpu().numpy(), seed)).to(rows)


@cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2^(b−1) positive levels of the best quantiser of the standard normal with 2^b of them, as float16.

    Solves x_i P_i = M_i, P_i the probability of cell i and M_i its first moment, from where Panter and Dite's density
    of levels has them: rounds of x_i ← M_i / P_i, then Newton's method.
    """
    count = 2 ** (bits - 1)
    normal, wide = NormalDist(), NormalDist(sigma=math.sqrt(3))
    levels = np.array([wide.inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)])
    for turn in range(CENTROIDS + NEWTON):
        edges = [0.0, *((levels[1:] + levels[:-1]) / 2)]
        density = np.array([*map(normal.pdf, edges), 0.0])
        share, moment = np.diff([*map(normal.cdf, edges), 1.0]), -np.diff(density)
        if turn < CENTROIDS:
            levels = moment / share
            continue
        moved = -np.diff(levels) * density[1:-1] / 4  # in x_i P_i − M_i, as a neighbour's level moves the edge between
        slope = np.diag(share + np.append(moved, 0.0) + np.append(0.0, moved))
        step = np.linalg.solve(slope + np.diag(moved, 1) + np.diag(moved, -1), levels * share - moment)
        levels = levels - step
        if np.abs(step).max() < EXACT:
            return tuple(levels.astype(np.float16).tolist())
    raise ContractError(f"lloyd_max: no levels for {bits} bits within {NEWTON} rounds")


def _solve(
    weight: Tensor, scales: Tensor, grid: GridSpec, hessian: Tensor | None, rounding: Any | None, book: Book | None
) -> Solution:
    if book is not None and (rounding is None or slots.kind_of(rounding) == "nearest"):
        return Solution(_nearest(weight, scales, grid.bits, book).to(torch.int8), {})
    solver, more = rounding or nearest.Spec(), () if book is None else (book,)
    solution: Solution = slots.module_of(solver).solve(
        weight, scales, grid.bits, hessian, solver, grid.dead_zone, *more
    )
    return solution


def _nearest(weight: Tensor, scales: Tensor, bits: int, book: Book | None) -> Tensor:
    return nearest_codes(weight, scales, bits) if book is None else book.nearest(weight / scales.float()[:, None])
