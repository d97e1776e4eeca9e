"""BigramHash (#162): a hashed table of token pairs, added to the token embedding.

Index at position t ≥ 1: ((36313·x_t) XOR (27191·x_{t−1})) mod (rows − 1); the first position of a window uses row
rows − 1. The table starts at zero, so that the term does. rows 2048 → 3072: −0.0009 bpb (#549).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fairway.model.linear import Linear, Table


@dataclass(frozen=True)
class Spec:
    rows: int = 6144
    width: int = 128  # of the table; projected to the model's
    scale: float = 0.05  # initial factor, learned

    def __post_init__(self) -> None:
        if self.rows < 2 or self.width < 1:
            raise ValueError(f"rows = {self.rows}, width = {self.width}: at least 2 rows of 1 are needed")


def bigram_index(tokens: Tensor, previous: Tensor | None, rows: int, bos: int | None = None) -> Tensor:
    """tokens: (B, S) integers; previous: (B, 1), the token before them, None at a window's start; bos: a token that
    begins as a window does -> (B, S) rows."""
    before = torch.cat((tokens[:, :1] if previous is None else previous, tokens[:, :-1]), dim=1)
    index = ((36313 * tokens) ^ (27191 * before)) % (rows - 1)
    if previous is None:
        index = torch.cat((torch.full_like(index[:, :1], rows - 1), index[:, 1:]), dim=1)
    return index if bos is None else torch.where(tokens == bos, rows - 1, index)


class Technique(nn.Module):
    """x: (B, S, d) embeddings -> x + scale · projection(table[bigram]); remembers the last token."""

    stage: Literal["before_norm", "after_norm"] = "before_norm"

    def __init__(self, spec: Spec, width: int, bos: int, apart: bool = False) -> None:
        super().__init__()
        self.bos = bos if apart else None
        self.rows = spec.rows
        self.table = Table(spec.rows, spec.width, "bigram")
        self.proj = Linear(spec.width, width, "bigram_proj")
        self.scale = nn.Parameter(torch.tensor(spec.scale))
        self.tagged = {"scale": ("scalar", "bigram_scale")}

    def forward(self, x: Tensor, tokens: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        pairs = self.table(bigram_index(tokens, past, self.rows, self.bos)).to(x.dtype)
        return x + self.scale.to(x.dtype) * self.proj(pairs), tokens[:, -1:]
