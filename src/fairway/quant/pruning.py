"""Pruning: the weights that matter least become zero.

before     the smallest |w| of each tensor, before rounding (the reference study: 2 to 10 % of the averaged weights,
           Hessians of the unpruned model); GPTQ's feedback refills many of the zeros
after      the smallest |ŵ| of each tensor, after rounding: these stay, which is what buys bytes
selective  after rounding, codes ±1 of all tensors together, the least damage first (#609, #1019)

`by` says how selective pruning ranks a code in row i and column j: "scale" by the square of its step s_i² (#609),
"hessian" by s_i² H_jj, "damage" by what it adds to tr(E H Eᵀ), E = W − Ŵ: q = ±1 set to zero moves E_ij by q s_i,

    Δ = s_i² H_jj + 2 q s_i (E H)_ij,

the others staying. The last two rank only tensors that have a Hessian. Equal ranks go in the model's order.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairway.base.errors import ContractError
from fairway.quant.grid import Quantized, Tensors

Rank = Literal["scale", "hessian", "damage"]


@dataclass(frozen=True)
class PruneSpec:
    when: Literal["never", "before", "after", "selective"] = "never"  # of rounding
    fraction: float = 0.0  # of each quantised tensor's weights; "selective": of the codes ±1 that are ranked
    by: Rank = "damage"  # the order of "selective"
    budget: int = 0  # bytes of the artifact: from `fraction` on, more is pruned until it fits; 0: no more

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"budget = {self.budget}: a number of bytes is needed, or 0 for none")
        if not math.isfinite(self.fraction) or not 0 <= self.fraction < 1:
            raise ValueError(f"fraction = {self.fraction}: a share in [0, 1) is needed")


def small(weight: Tensor, fraction: float) -> Tensor:
    """Where |w| is strictly below the tensor's `fraction` quantile: a mask of weight's shape.

    Weights equal to the quantile stay, so that a tensor with more zeros than `fraction` is left as it is.
    """
    rank = math.floor(fraction * weight.numel())
    if rank == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    magnitude = weight.abs()
    return magnitude < magnitude.flatten().kthvalue(rank + 1).values  # unlike quantile(), without a limit of 2^24


def selective(
    tensors: Tensors,
    count: int,
    by: Rank = "scale",
    weights: Mapping[str, Tensor] | None = None,
    hessians: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """The tensors with `count` codes ±1 set to zero (all of them where there are fewer), the least damage first.

    weights: the float weights, by name, for "damage"; hessians: by name, for "hessian" and "damage".
    """
    integers = rankable(tensors, by, hessians or {})
    if not integers and count and by != "scale":
        raise ContractError(f"prune.by = {by!r}: no matrix has a Hessian; calibrate again, or prune by 'scale'")
    found = [_ranked(name, value, by, weights or {}, hessians or {}) for name, value in integers.items()]
    chosen = _least([ranks for _, ranks in found], count)
    pruned = dict(tensors)
    for (name, value), (places, _), mask in zip(integers.items(), found, chosen, strict=True):
        codes = value.codes.copy()
        codes.reshape(-1)[places[mask]] = 0
        pruned[name] = replace(value, codes=codes)
    return pruned


def rankable(tensors: Tensors, by: Rank, hessians: Mapping[str, Tensor]) -> dict[str, Quantized]:
    """The tensors whose codes `selective` can rank: all on a grid, or those that have a Hessian."""
    integers = {name: value for name, value in tensors.items() if isinstance(value, Quantized)}
    return integers if by == "scale" else {name: value for name, value in integers.items() if name in hessians}


def ones(tensors: Mapping[str, Quantized]) -> int:
    """How many codes are ±1."""
    return sum(int((np.abs(value.codes) == 1).sum()) for value in tensors.values())


def _ranked(
    name: str, value: Quantized, by: Rank, weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Where codes ±1 stand in the flat tensor, and the rank of each."""
    places = np.flatnonzero(np.abs(value.codes) == 1)
    rows, cols = np.divmod(places, value.shape[1])
    step = value.scales.astype(np.float32)[rows]
    if by == "scale":
        return places, step**2
    hessian = hessians[name].double().cpu()
    ranks = step.astype(np.float64) ** 2 * hessian.diagonal().numpy()[cols]
    if by == "damage":
        if name not in weights:
            raise ContractError(f"{name}: pruning by damage needs its float weights")
        error = weights[name].detach().double().cpu() - torch.from_numpy(value.dequantize()).double()
        ranks += 2 * value.codes.reshape(-1)[places] * step * (error @ hessian).numpy().reshape(-1)[places]
    return places, ranks.astype(np.float32)


def _least(ranks: list[NDArray[np.float32]], count: int) -> list[NDArray[np.bool_]]:
    """Masks of the `count` smallest of all ranks together; of equal ones the first."""
    whole = np.concatenate(ranks) if ranks else np.empty(0, np.float32)
    count = min(count, len(whole))
    mask = np.zeros(len(whole), bool)
    if count:
        edge = np.partition(whole, count - 1)[count - 1]
        mask = whole < edge
        mask[np.flatnonzero(whole == edge)[: count - int(mask.sum())]] = True
    return np.split(mask, np.cumsum([len(part) for part in ranks])[:-1]) if ranks else []
