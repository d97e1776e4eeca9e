"""A small causal network with the interface of the house's model, for tests that need no real one."""

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """hidden_t = tanh(W · Σ_{s≤t} decay^(t−s) E[x_s]); logits = hidden Eᵀ. Causal, differentiable, a few numbers."""

    def __init__(self, vocab: int = 17, width: int = 8, seed: int = 0, decay: float = 0.7) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(vocab, width, generator=drawn))
        self.mix = nn.Parameter(torch.randn(width, width, generator=drawn) / width**0.5)
        self.vocab, self.decay = vocab, decay

    def forward(self, tokens: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embedding[tokens]
        distance = torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])[None, :]
        weight = torch.where(distance >= 0, self.decay ** distance.clamp(min=0), 0.0).to(x.dtype)
        state = weight @ x
        if past is not None:
            state = state + self.decay ** torch.arange(1, tokens.shape[1] + 1)[None, :, None] * past[:, None]
        return torch.tanh(state @ self.mix), state[:, -1]

    def logits(self, hidden: Tensor, last: int | None = None) -> Tensor:
        if last is not None:
            hidden = hidden[:, hidden.shape[1] - last :]
        return hidden @ self.embedding.T
