"""Optimisers that own the reduction of their gradients: each rank is left with the sum of some, not of all.

Such an optimiser offers, beside `step`,

    reduce()                starts to sum its parameters' gradients over the ranks, and takes them off the parameters
    gradients() -> list     waits; the summed gradients that this rank holds, each of them held by one rank alone

and its `state_dict` is called by all ranks together: what it saves is whole, whatever their number.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairway.base.ranks import Ranks


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) trains with such an optimiser."""
    return any(chosen["kind"] == "parallel_muon" for chosen in recipe["train"]["optim"].values())


def reduce(optimizers: Iterable[Any], parameters: list[nn.Parameter], ranks: Ranks, clip: float) -> Tensor:
    """Sums all gradients over the ranks, clips them by the norm of the summed ones, and answers that norm. The
    study's run clipped what each rank had by itself: eight ranks, eight factors.

    clip: the largest norm of all gradients together; 0: none.
    """
    owners = [optimizer for optimizer in optimizers if hasattr(optimizer, "reduce")]
    owned = {id(parameter) for owner in owners for group in owner.param_groups for parameter in group["params"]}
    shared = [parameter for parameter in parameters if id(parameter) not in owned]
    for owner in owners:
        owner.reduce()
    ranks.sum_gradients(shared)  # while the owners' are on their way
    alike = [parameter.grad for parameter in shared if parameter.grad is not None]
    parts = [part for owner in owners for part in owner.gradients()]
    nothing = parameters[0].new_zeros(1)  # what a rank without a matrix of its own adds
    norm = (_norm([nothing, *alike]).square() + ranks.sum_(_norm([nothing, *parts]).square())).sqrt()
    if clip:
        torch._foreach_mul_([*alike, *parts], (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)
