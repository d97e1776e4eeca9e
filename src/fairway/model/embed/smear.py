"""SmearGate (#65, #102): every position takes a learned share of the one before it.

x_t = (1 − g) u_t + g u_{t−1}, g = σ(w), w ∈ R^d starting at 0, u_{−1} = 0. With `document_aware` nothing flows into a
BOS from the document before it (#1797 was ruled a leak for document-wise scoring; the fix moved 1.0616 to 1.0614).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spec:
    document_aware: bool = False  # the reference's smears over document boundaries


def smear(u: Tensor, before: Tensor, gate: Tensor) -> Tensor:
    """u, before: (B, S, d), gate: (d,) in (0, 1) -> (B, S, d)"""
    return (1 - gate) * u + gate * before


class Technique(nn.Module):
    """u: (B, S, d) normalised embeddings -> the same, smeared; remembers the last vector before the gate."""

    stage: Literal["before_norm", "after_norm"] = "after_norm"

    def __init__(self, spec: Spec, width: int, bos: int, apart: bool = False) -> None:
        super().__init__()
        self.bos = bos if spec.document_aware or apart else None
        self.gate = nn.Parameter(torch.zeros(width))
        self.tagged = {"gate": ("gain", "smear")}

    def forward(self, u: Tensor, tokens: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        first = torch.zeros_like(u[:, :1]) if past is None else past
        before = torch.cat((first, u[:, :-1]), dim=1)
        if self.bos is not None:
            before = before * (tokens != self.bos).unsqueeze(-1).to(u.dtype)
        return smear(u, before, torch.sigmoid(self.gate).to(u.dtype)), u[:, -1:]
