"""Plain causal attention (arXiv 1706.03762): the baseline's."""

from dataclasses import dataclass

from torch import Tensor, nn

from fairway.model.causal import causal_attention


@dataclass(frozen=True)
class Spec:
    pass


class Technique(nn.Module):
    """q: (B, H, S, h), k and v: (B, G, T, h), window: positions a query sees, 0: all before it; mask: see
    `causal_attention` -> (B, H, S, h)"""

    def __init__(self, spec: Spec, layer: int, layers: int) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int = 0, mask: Tensor | None = None) -> Tensor:
        return causal_attention(q, k, v, window, mask)
