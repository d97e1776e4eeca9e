"""Two sources of values beside a layer's own projection: embeddings of the tokens, and the first layer's values.

Value embedding (#374): v ← v + s_layer · s · P(table[token]), one shared table, in a few late layers.
Value residual (arXiv 2410.17897; #569): layers i ≥ 1 take the first layer's values v⁽⁰⁾ (without value embedding):
additive v ← v + σ(α_i) v⁽⁰⁾, α_i = 0 at the start; gated v ← (1−g) v + g v⁽⁰⁾, g = σ(γ_i), γ_i = −1.5 at the start.
"""

import torch
from torch import Tensor, nn

from fairway.model.linear import Linear, Table
from fairway.model.spec import ValueEmbeddingSpec


class ValueEmbedding(nn.Module):
    """tokens: (B, S) -> (B, S, G·h), the same for every layer that uses it."""

    def __init__(self, spec: ValueEmbeddingSpec, vocab: int, outputs: int) -> None:
        super().__init__()
        self.table = Table(vocab, spec.width, "value")
        self.proj = Linear(spec.width, outputs, "value_proj")
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.tagged = {"scale": ("scalar", "value_scale")}

    def forward(self, tokens: Tensor, like: Tensor) -> Tensor:
        return self.scale.to(like.dtype) * self.proj(self.table(tokens).to(like.dtype))


class ValueResidual(nn.Module):
    """v, first: (B, S, G·h) -> (B, S, G·h)"""

    def __init__(self, form: str, layer: int) -> None:
        super().__init__()
        self.gated = form == "gated"
        self.mix = nn.Parameter(torch.tensor(-1.5 if self.gated else 0.0))
        self.tagged = {"mix": ("scalar", "value_residual")}
        self.layer = layer

    def forward(self, v: Tensor, first: Tensor) -> Tensor:
        share = torch.sigmoid(self.mix).to(v.dtype)
        return (1 - share) * v + share * first if self.gated else v + share * first
