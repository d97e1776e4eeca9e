"""The only forward of the house: training, calibration, scoring, adapting and decoding all use it.

1. e = E[x] + hashed features; u = RMS(e); x0 = smear(u).
2. The first half of the layers push their outputs, the second half take them back in reverse (U-Net skips): additive
   x ← x + s_j ⊙ skip, or gated x ← g ⊙ x + (1−g) ⊙ (s_j ⊙ skip), g = σ(γ_j) (#1089).
3. hidden = RMS(x); logits = c·tanh(hidden Eᵀ / c).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fairway.base import slots
from fairway.model.block import Block, Flow
from fairway.model.init import initialise
from fairway.model.linear import Table
from fairway.model.memory import Memory, Rolling
from fairway.model.norm import rms_norm
from fairway.model.rotary import rotary_base, rotation
from fairway.model.spec import ModelSpec
from fairway.model.value import ValueEmbedding


class Past(NamedTuple):
    """What a position needs of those before it."""

    length: int
    layers: tuple[Memory, ...]
    embed: tuple[Tensor, ...] | None  # of the embedding's parts, and where a document began (apart); None: the start

    def narrow(self, rows: int) -> "Past":
        """Of the first `rows` sequences. A rolling past is consumed."""
        embed = None if self.embed is None else tuple(memory[:rows] for memory in self.embed)
        return Past(self.length, tuple(memory.narrow(rows) for memory in self.layers), embed)


class GPT(nn.Module):
    """tokens -> hidden -> logits.

    vocab: how many tokens there are. Parameters are uninitialised until `build_model` or a file fills them.
    """

    def __init__(self, spec: ModelSpec, vocab: int) -> None:
        super().__init__()
        self.spec, self.vocab = spec, vocab
        self.compute: torch.dtype | None = None  # of activations; None: that of the parameters
        self.embedding = Table(vocab, spec.width, "embedding")
        self.embed = nn.ModuleList(
            slots.module_of(part).Technique(part, spec.width, spec.bos, spec.apart) for part in spec.embed
        )
        uses_values = spec.value_embedding.width > 0 and spec.value_embedding.layers
        narrow = spec.kv_heads * spec.head
        self.values = ValueEmbedding(spec.value_embedding, vocab, narrow) if uses_values else None
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.layers))
        self.seen = slots.optional("fairway.model.apart").seen if spec.apart else None
        self.encoders = spec.layers // 2
        skips = 0 if spec.skips == "none" else min(self.encoders, spec.layers - self.encoders)
        self.skip = nn.Parameter(torch.ones(skips, spec.width)) if skips else None
        self.skip_gate = nn.Parameter(torch.zeros(skips, spec.width)) if skips and spec.skips == "gated" else None
        self.tagged = {"skip": ("gain", "skip"), "skip_gate": ("gain", "skip_gate")}
        self.base = rotary_base(spec.rotary, spec.context)

    def forward(self, tokens: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """tokens: (B, S) int64; past: of the positions before them -> hidden (B, S, d) after the final norm, past.

        A rolling past (`begin`) is written in place: it is consumed, and only the returned one can go on.
        """
        start = past.length if past is not None else 0
        x, carried = self._embed(tokens, past)
        cos, sin = rotation(start, tokens.shape[1], self.spec.rotary.dims, self.base, like=x)
        mask = None
        if self.seen is not None:
            mask, begun = self.seen(tokens, past, self.spec.bos)
            carried += (begun,)
        flow = Flow(x, cos, sin, self.values(tokens, x) if self.values is not None else None, mask)
        first: Tensor | None = None
        stack: list[Tensor] = []
        memories: list[Memory] = []
        for layer, block in enumerate(self.blocks):
            if layer >= self.encoders and stack and self.skip is not None:
                x = self._join(x, stack.pop(), layer - self.encoders)
            x, memory, raw = block(x, flow, first, past.layers[layer] if past is not None else None)
            memories.append(memory)
            if layer == 0:
                first = raw
            if layer < self.encoders:
                stack.append(x)
        return rms_norm(x), Past(start + tokens.shape[1], tuple(memories), carried)

    def begin(self, rows: int, window: int, length: int) -> Past:
        """The rolling past of `rows` sequences at their start, in which a position sees the last `window`, itself too.

        length: the most positions a sequence will have; room is taken for at most 2·window. A forward with it takes at
        most `window` positions at once (ValueError), and belongs under no_grad.
        """
        if min(rows, window, length) < 1:
            raise ValueError(f"rows = {rows}, window = {window}, length = {length}: each must be at least 1")
        like, spec = self.embedding.weight, self.spec
        shape = (2, rows, spec.kv_heads, min(length, 2 * window), spec.head)
        rooms = [like.new_empty(shape, dtype=self.compute or like.dtype) for _ in self.blocks]
        return Past(0, tuple(Rolling(room, window) for room in rooms), None)

    def logits(self, hidden: Tensor, last: int | None = None) -> Tensor:
        """hidden: (B, S, d) -> (B, S, vocab), or (B, last, vocab) for the last positions alone."""
        if last is not None:
            hidden = hidden[:, hidden.shape[1] - last :]
        cap = self.spec.softcap
        # The softcap in the parameters' type: in bf16 it would round a second time, in steps of 0.125 near 30.
        z = self.embedding.project(hidden).to(self.embedding.weight.dtype)
        return cap * torch.tanh(z / cap)

    def _embed(self, tokens: Tensor, past: Past | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.embedding(tokens)
        if self.compute is not None:
            x = x.to(self.compute)
        before = past.embed if past is not None else None
        memories: list[Tensor] = [tokens] * len(self.embed)
        for stage in ("before_norm", "after_norm"):
            for i, part in enumerate(self.embed):
                if part.stage == stage:
                    x, memories[i] = part(x, tokens, before[i] if before is not None else None)
            if stage == "before_norm":
                x = rms_norm(x)
        return x, tuple(memories)

    def _join(self, x: Tensor, skip: Tensor, j: int) -> Tensor:
        assert self.skip is not None
        scaled = self.skip[j].to(x.dtype) * skip
        if self.skip_gate is None:
            return x + scaled
        gate = torch.sigmoid(self.skip_gate[j]).to(x.dtype)
        return gate * x + (1 - gate) * scaled


def build_model(spec: ModelSpec, vocab: int, seed: int) -> GPT:
    """A fresh model, its parameters drawn from `seed` (each from a stream of its own name)."""
    model = GPT(spec, vocab)
    initialise(model, spec, seed)
    return model
