"""Cross-entropy: −ln softmax(logits)[target], the code length in nats."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    pass


def loss(spec: Spec, logits: Tensor, targets: Tensor) -> Tensor:
    """logits: (N, V) of any dtype, targets: (N,) -> (N,) nats, computed in float32 where the logits are narrower."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="none")
