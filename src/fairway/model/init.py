"""Initial values. Source: the code of #549's lineage.

Embedding N(0, 0.005²); matrices orthogonal (gain 1), attention output and MLP down zero, so that every block begins
as the identity; projections of hashed features and value embeddings scaled by 1/sqrt(2L). Logits begin near 0, the loss
near ln(vocab). "uniform" draws matrices as torch's Linear does, U(±1/sqrt(inputs)): the challenge baseline's.
"""

import math

import torch
from torch import Tensor, nn

from fairway.base.devices import generator
from fairway.model.roles import tags
from fairway.model.spec import ModelSpec

ZERO = ("o", "down", "bigram")
SIDE_PROJECTIONS = ("bigram_proj", "value_proj")


@torch.no_grad()
def initialise(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fills matrices and tables in place; gains and scalars have their initial values from their modules."""
    found = tags(model)
    for name, parameter in model.named_parameters():
        tag = found[name]
        if tag.part in ZERO:
            parameter.zero_()
        elif tag.role == "table":
            std = spec.embedding_std if tag.part == "embedding" else 0.01
            parameter.normal_(0.0, std, generator=generator(seed, f"init/{name}"))
        elif tag.role == "matrix":
            _matrix(parameter, spec, tag.part, generator(seed, f"init/{name}"))


def _matrix(weight: Tensor, spec: ModelSpec, part: str, chance: torch.Generator) -> None:
    if spec.init == "uniform":
        bound = 1 / math.sqrt(weight.shape[1])
        weight.uniform_(-bound, bound, generator=chance)
        return
    nn.init.orthogonal_(weight, generator=chance)
    if part in SIDE_PROJECTIONS:
        weight.mul_(1 / math.sqrt(2 * spec.layers))
