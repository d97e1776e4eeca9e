"""What parallel Muon is held against: `muon` on one rank with the whole gradient. Light: every rank imports it."""

from dataclasses import replace

import torch

from fairway.base.ranks import Ranks
from fairway.train.loop import OptimSpec
from fairway.train.optim import muon, parallel_muon
from tests.train.test_loop import SPEC

F64 = torch.float64
SHAPES = [(6, 10), (10, 4), (6, 10), (5, 5), (6, 10), (5, 5)]  # banks of three, of one and of two matrices
CLIP = 0.5  # of gradients of norm about 20
TRAINED = replace(SPEC, clip=0.2, optim=OptimSpec(matrix=parallel_muon.Spec(lr=0.02)), checkpoint_seconds=1e-6)


def problem(dtype: torch.dtype = F64) -> list[torch.nn.Parameter]:
    chance = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=chance, dtype=dtype)) for s in (*SHAPES, (7,))]


def gradients(step: int, part: int, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    """Those of one of two parts of a batch; one matrix has none in the second."""
    chance = torch.Generator().manual_seed(100 * step + part)
    return [
        (part == 0 or place != 2) * torch.randn(s, generator=chance, dtype=dtype)
        for place, s in enumerate((*SHAPES, (7,)))
    ]


def reference(steps: int, dtype: torch.dtype = F64, clip: float = 0.0, words: dict | None = None):
    """`muon` on one rank with the whole gradient, and a vector that plain descent moves: (parameters, optimizer)."""
    parameters = problem(dtype)
    optimizer = muon.build(muon.Spec(lr=0.1, **(words or {})), parameters[:-1], Ranks())
    for step in range(steps):
        pairs = zip(gradients(step, 0, dtype), gradients(step, 1, dtype), strict=True)
        for parameter, (one, other) in zip(parameters, pairs, strict=True):
            parameter.grad = one + other
        if clip:
            assert torch.nn.utils.clip_grad_norm_(parameters, clip) > clip, "the clip must be at work"
        optimizer.step()
        with torch.no_grad():
            parameters[-1] -= 0.1 * parameters[-1].grad
    return parameters, optimizer
