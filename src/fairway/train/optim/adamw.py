"""AdamW (arXiv 1711.05101): torch's own. Decay is decoupled and follows the scheduled rate: w ← w(1 − lr·wd)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fairway.base.ranks import Ranks


@dataclass(frozen=True)
class Spec:
    lr: float = 0.025  # 1/step
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.04  # 1/step, in units of lr


def build(spec: Spec, parameters: Iterable[torch.nn.Parameter], ranks: Ranks) -> torch.optim.Optimizer:
    """Every rank holds the same state and takes the same step."""
    return torch.optim.AdamW(
        list(parameters),
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
        weight_decay=spec.weight_decay,
        fused=True,
    )
