"""One layer: attention and MLP on a residual stream that is first mixed with the embedding.

x_in = m_0 ⊙ x + m_1 ⊙ x0;  x' = x_in + a ⊙ Attn(ls·RMS(x_in));  out = x' + b ⊙ MLP(ls·RMS(x')),  ls = 1/sqrt(layer+1).
The residual base is x_in, not x (#549's lineage). Queries and keys are RMS-normalised over a head, so that |q| = |k| =
√h and attention logits lie within ±√h·gain.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fairway.base import slots
from fairway.model.linear import Linear
from fairway.model.memory import KeyValue, Memory
from fairway.model.norm import rms_norm
from fairway.model.rotary import rotate
from fairway.model.spec import ModelSpec
from fairway.model.value import ValueResidual


class Flow(NamedTuple):
    """What all layers of one forward share."""

    x0: Tensor  # (B, S, d), the embedding
    cos: Tensor  # (S, rotary/2)
    sin: Tensor
    values: Tensor | None  # (B, S, G·h), the value embedding
    mask: Tensor | None  # (B, 1, S, T) bool, which keys a position sees; None: all before it


class Attention(nn.Module):
    """z: (B, S, d) -> (B, S, d), with the layer's keys and values so far and its raw values."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head, self.layer = spec.heads, spec.kv_heads, spec.head, layer
        narrow = spec.kv_heads * spec.head
        self.q = Linear(spec.width, spec.width, "q", layer)
        self.k = Linear(spec.width, narrow, "k", layer)
        self.v = Linear(spec.width, narrow, "v", layer)
        self.o = Linear(spec.width, spec.width, "o", layer)
        self.gain = nn.Parameter(torch.full((spec.heads,), spec.qk_gain))
        self.tagged = {"gain": ("gain", "q_gain"), "value_scale": ("scalar", "value_layer_scale")}
        embeds = spec.value_embedding.width > 0 and layer in spec.value_embedding.layers
        self.value_scale = nn.Parameter(torch.tensor(1.0)) if embeds else None
        residual = spec.value_residual != "none" and layer > 0
        self.residual = ValueResidual(spec.value_residual, layer) if residual else None
        self.attend = slots.module_of(spec.attention).Technique(spec.attention, layer, spec.layers)

    def forward(
        self, z: Tensor, flow: Flow, first: Tensor | None, past: Memory | None
    ) -> tuple[Tensor, Memory, Tensor]:
        raw = self.v(z)
        value = raw
        if self.value_scale is not None and flow.values is not None:
            value = value + self.value_scale.to(z.dtype) * flow.values
        if self.residual is not None and first is not None:
            value = self.residual(value, first)
        q = rotate(rms_norm(self._split(self.q(z), self.heads)), flow.cos, flow.sin)
        k = rotate(rms_norm(self._split(self.k(z), self.kv_heads)), flow.cos, flow.sin)
        v = self._split(value, self.kv_heads)
        q = q * self.gain.to(q.dtype)[:, None, None]
        memory = KeyValue(k, v) if past is None else past.extend(k, v)
        y = self.attend(q, memory.k, memory.v, memory.window, flow.mask).transpose(1, 2).flatten(2)
        return self.o(y), memory, raw

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """(B, S, heads·h) -> (B, heads, S, h)"""
        return x.unflatten(-1, (heads, self.head)).transpose(1, 2)


class Block(nn.Module):
    """x: (B, S, d) -> (B, S, d)"""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm_scale = 1 / math.sqrt(layer + 1) if spec.layer_scale else 1.0
        self.attention = Attention(spec, layer)
        self.mlp = slots.module_of(spec.mlp).Technique(spec.mlp, spec.width, spec.hidden, layer)
        self.attn_scale = nn.Parameter(torch.ones(spec.width))
        self.mlp_scale = nn.Parameter(torch.ones(spec.width))
        # No torch.stack: on the meta device it imports sympy and dynamo, 2 s of whatever opens a file.
        mix = torch.tensor([[1.0] * spec.width, [0.0] * spec.width])
        self.resid_mix = nn.Parameter(mix) if spec.residual_mix else None
        self.tagged = {name: ("gain", name) for name in ("attn_scale", "mlp_scale", "resid_mix")}

    def forward(
        self, x: Tensor, flow: Flow, first: Tensor | None, past: Memory | None
    ) -> tuple[Tensor, Memory, Tensor]:
        if self.resid_mix is not None:
            mix = self.resid_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * flow.x0
        attended, memory, raw = self.attention(self._norm(x), flow, first, past)
        x = x + self.attn_scale.to(x.dtype) * attended
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(self._norm(x))
        return x, memory, raw

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x) * self.norm_scale
