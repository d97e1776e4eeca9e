"""Roles: how Muon, GPTQ, pruning and the packer find parameters. Nobody matches on names.

Every module that owns parameters says what they are in `tagged`; `tags` collects them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fairway.base.errors import ContractError
from fairway.model.linear import Linear, Table

Role = Literal["matrix", "table", "gain", "scalar"]


@dataclass(frozen=True)
class Tag:
    """What a parameter is: its role (who optimises and quantises it), its part of the model, its layer."""

    role: Role
    part: str
    layer: int | None


def tags(model: nn.Module) -> dict[str, Tag]:
    """The tag of every parameter, in the model's order. ContractError for one that no module declares."""
    return {name: Tag(*_tagged(module, leaf, name)) for name, module, leaf, _ in _owned(model)}


def projections(model: nn.Module) -> dict[str, Linear | Table]:
    """The module that owns each matrix or table, by the parameter's name."""
    return {name: module for name, module, _, _ in _owned(model) if isinstance(module, (Linear, Table))}


def parameter_count(model: nn.Module) -> int:
    """How many numbers the model learns (the tied embedding counts once)."""
    return sum(parameter.numel() for parameter in model.parameters())


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            yield (f"{prefix}.{leaf}" if prefix else leaf), module, leaf, parameter


def _tagged(module: nn.Module, leaf: str, name: str) -> tuple[Role, str, int | None]:
    declared: dict[str, tuple[Role, str]] = getattr(module, "tagged", {})
    if leaf not in declared:
        raise ContractError(f"{name}: {type(module).__name__}.tagged does not say what this parameter is")
    role, part = declared[leaf]
    layer: int | None = getattr(module, "layer", None)
    return role, part, layer
