"""Hessians: H = (1/N) Σ x xᵀ over the inputs x of every matrix, gathered by plugs in the one forward.

The squared error of a matrix's output under a change D of its weights is tr(D H Dᵀ), which is what rounding should
keep small. Sums are float32, as the reference's; the query, key and value matrices of a layer see the same tensor, and
its product is computed once.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fairway.base import files
from fairway.base.errors import ContractError, DataError
from fairway.base.journal import Run
from fairway.model import GPT, projections, tags

Hessians = dict[str, Tensor]
"""(inputs, inputs) float32 by the name of the parameter."""


class _Products:
    """x -> Σ x xᵀ, remembered for the last x."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._product = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self._last:
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            self._last, self._product = x, flat.T @ flat
        return self._product


class _Observer:
    """The plug of one matrix: adds to its sum."""

    def __init__(self, total: Tensor, products: _Products) -> None:
        self.total, self.products, self.inputs = total, products, 0

    def __call__(self, x: Tensor) -> None:
        self.total += self.products(x)
        self.inputs += x.numel() // x.shape[-1]


def gather(
    model: GPT,
    batches: Iterable[Tensor],
    names: Collection[str] | None = None,
    run: Run | None = None,
    sequences: int = 0,
) -> Hessians:
    """The Hessians of the matrices `names` (all of role matrix, and the tied embedding's, where left out).

    batches: (B, T) int64 each, this rank's share; sequences: how many all ranks will see, for the progress meter.
    The mean runs over the inputs of all ranks. ContractError where a matrix was never used.
    """
    run = run or Run()
    owners = projections(model)
    if names is None:
        names = [name for name, tag in tags(model).items() if tag.role == "matrix" or tag.part == "embedding"]
    products = _Products()
    plugs = {name: _Observer(_square(owners[name].weight), products) for name in names}
    try:
        for name, plug in plugs.items():
            owners[name].observe = plug
        _forward(model, batches, run, sequences)
    finally:
        for name in names:
            owners[name].observe = None
    return {name: _mean(name, plug, run) for name, plug in plugs.items()}


def write_hessians(path: Path, hessians: Hessians) -> None:
    """The Hessians as a .safetensors file, so that one calibration serves several plans."""
    from safetensors.torch import save

    files.write(path, save({name: hessian.cpu().contiguous() for name, hessian in hessians.items()}))


def read_hessians(path: Path) -> Hessians:
    """What `write_hessians` wrote; DataError for another file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        hessians: Hessians = load(files.read(path))
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{path}: no Hessians: {error}; calibrate again") from error
    if any(h.ndim != 2 or h.shape[0] != h.shape[1] or h.dtype != torch.float32 for h in hessians.values()):
        raise DataError(f"{path}: no Hessians: square float32 matrices are expected; calibrate again")
    return hessians


def _square(weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float32, device=weight.device)


@torch.no_grad()
def _forward(model: GPT, batches: Iterable[Tensor], run: Run, sequences: int) -> None:
    device, done = next(model.parameters()).device, 0
    with run.meter("calibrate", max(sequences, 1), "sequences") as meter:
        for tokens in batches:
            model.logits(model(tokens.to(device))[0])
            done += len(tokens) * run.ranks.world
            meter.update(done)


def _mean(name: str, plug: _Observer, run: Run) -> Tensor:
    inputs = run.ranks.sum_(torch.tensor([plug.inputs], dtype=torch.float64, device=plug.total.device))
    run.ranks.sum_(plug.total)
    if inputs.item() == 0:
        raise ContractError(f"{name}: no input reached it; calibration needs at least one batch")
    return plug.total / float(inputs.item())
