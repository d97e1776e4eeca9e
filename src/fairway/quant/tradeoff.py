"""What a grid would cost and do, tensor by tensor, before anything is rounded: bits per weight against damage.

One step s for all rows of a tensor (`rule = "absolute"`), reconstruction in the middle of a cell, dead zone d:

    bits     the entropy of code(w/s)
    damage   κ · Σ_i Σ_j δ_ij² / U_jj²,   δ the rounding errors of the matrix, H⁻¹ = UᵀU

The second is GPTQ's own objective tr(E H Eᵀ): its rounding errors are δ, and each reaches the output through its own
U_jj alone.
GPTQ rounds weights that carry the errors of columns before them; that noise, of variance E[δ²] Σ_{k<j} (U_kj/U_kk)² in
column j, is added before codes are counted. Against real solves of 23 tensors at 0.1 to 1.4 of their own
deviations: bits within 2 % (one tensor 4 %), damage within 13 % for most (at the coarse end up to a third off for one).

κ turns an error into nats per token of the loss, so that tensors can be weighed against each other. It is measured on
trained models (LOG.md; one tensor rounded at a time): a matrix whose output moves by a share r of its energy costs
0.12 r, where single ones lie between 0.01 and 0.3; errors of the tied head's logits, as a softmax asks, half their
mean square times 2.4 (frequent rows are longer, and the table is an input too); a table without Hessian 0.22 of its
relative error, a tied embedding without one 2.65. Sums over a whole model were within 25 % of the loss that was lost,
from 0.003 to 0.4 nats.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairway.model import Tag
from fairway.quant.dead_zone import towards_zero
from fairway.quant.grid import MOST_BITS, largest
from fairway.quant.rounding.gptq import Factor

Floats = NDArray[np.float64]

MATRIX, HEAD, TABLE, EMBEDDING = 0.12, 1.2, 0.22, 2.65  # κ of the module's docstring
DEAD_ZONES = (0.0, 0.05, 0.1, 0.15, 0.2)
FINER = 2.0**-0.25  # from one step to the next
COARSEST = 4.0  # deviations in a step: next to nothing is left
NARROWEST = 3.0  # deviations in the clip of int8's finest step: too much is cut off
SAMPLE = 1 << 16  # weights whose codes are counted: their entropy is within 0.2 % of the tensor's
SEED = 20_260


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """A tensor's choices. steps: (S,) ascending, in units of the weights; dead_zones: (Z,); bits: (S, Z) per weight;
    damage: (S, Z) nats per token of the whole tensor; count: its weights; rms, largest: of its weights."""

    count: int
    rms: float
    largest: float
    steps: Floats
    dead_zones: tuple[float, ...]
    bits: Floats
    damage: Floats


@torch.no_grad()
def tradeoff(tag: Tag, weight: Tensor, hessian: Tensor | None, factor: Factor | None) -> Tradeoff:
    """weight: (rows, cols); hessian: (cols, cols) of its inputs and its factor; None: rounded to nearest."""
    w = weight.double()
    rms = float(w.square().mean().sqrt()) or 1.0
    top = float(w.abs().max())
    count = 1 + math.floor(math.log(COARSEST / NARROWEST * largest(MOST_BITS)) / -math.log(FINER))
    steps = COARSEST * rms * np.power(FINER, np.arange(count - 1, -1, -1), dtype=np.float64)
    values, weights, noise = _sampled(w, factor)
    scale = _kappa(tag, w, hessian) * (1.0 if factor is None else w.numel() * float(weights.mean()))
    bits, damage = np.empty((count, len(DEAD_ZONES))), np.empty((count, len(DEAD_ZONES)))
    for i, step in enumerate(steps):
        for j, dead_zone in enumerate(DEAD_ZONES):
            error = _error(values, step, dead_zone)
            shaken = values if noise is None else values + math.sqrt(error) * noise
            bits[i, j] = _entropy(_codes(shaken, step, dead_zone))
            damage[i, j] = scale * error * (w.numel() if factor is None else 1.0)
    useful = int(np.argmin(damage[:, 0]))  # finer steps cut off more than they round better
    return Tradeoff(w.numel(), rms, top, steps[useful:], DEAD_ZONES, bits[useful:], damage[useful:])


def kappa(tag: Tag, weight: Tensor, hessian: Tensor | None) -> float:
    """Nats per token for one unit of tr(E H Eᵀ), or of ‖E‖² where there is no Hessian."""
    return _kappa(tag, weight.double(), hessian)


def _kappa(tag: Tag, weight: Tensor, hessian: Tensor | None) -> float:
    if hessian is None:
        energy = float(weight.square().sum()) or 1.0
        return (EMBEDDING if tag.part == "embedding" else TABLE) / energy
    if tag.part == "embedding":
        return HEAD / len(weight)
    return MATRIX / (float((weight @ hessian.double() * weight).sum()) or 1.0)


def _sampled(weight: Tensor, factor: Factor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Some of the weights (n,); 1/U_jj² of every column; and for each sampled weight a normal number of the deviation
    that a unit of rounding error gives it."""
    drawn = torch.Generator().manual_seed(SEED)
    flat = weight.reshape(-1)
    places = torch.randint(len(flat), (min(SAMPLE, len(flat)),), generator=drawn)
    if len(flat) <= SAMPLE:
        places = torch.arange(len(flat))
    places = places.to(weight.device)
    if factor is None:
        return flat[places], torch.ones(1), None
    diagonal = factor.upper.diagonal()
    shares = (factor.upper.triu(1) / diagonal[:, None]).square().sum(dim=0)  # over the columns before
    deviation = torch.empty_like(shares)
    deviation[factor.order] = shares.sqrt()
    normal = torch.randn(len(places), generator=drawn, dtype=torch.float64).to(weight.device)
    return flat[places], diagonal.square().reciprocal(), normal * deviation[places % weight.shape[1]]


def _error(values: Tensor, step: float, dead_zone: float) -> float:
    """E[δ²] of rounding, in the weights' units squared."""
    return float((values - step * _codes(values, step, dead_zone)).square().mean())


def _codes(values: Tensor, step: float, dead_zone: float) -> Tensor:
    """On the widest grid there is: beyond it a weight is cut off."""
    limit = largest(MOST_BITS)
    return towards_zero(values / step, dead_zone).clamp(-limit, limit)


def _entropy(codes: Tensor) -> float:
    counts: Any = torch.bincount((codes - codes.min()).long())
    share = counts[counts > 0].double() / len(codes)
    return float(-(share * share.log2()).sum()) + 0.0
