"""The two owners of big parameters: Linear (matrices) and Table (embeddings), with three plugs each.

`fake_quant` replaces the weight in the forward (quantisation-aware training), `observe` sees the inputs (Hessians),
`adapter` adds a low-rank correction. Plugs are set before compilation: a flag inside the graph would be folded away,
which is how the reference study's quantisation-aware training never ran.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Plug = Callable[[Tensor], Tensor]


class Linear(nn.Module):
    """y = x Wᵀ, without bias.

    weight: (outputs, inputs); x: (..., inputs) -> (..., outputs). part, layer: see roles.Tag.
    """

    def __init__(self, inputs: int, outputs: int, part: str, layer: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.tagged = {"weight": ("matrix", part)}
        self.layer = layer
        self.fake_quant: Plug | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self.adapter: Plug | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.fake_quant is None else self.fake_quant(self.weight)
        if self.observe is not None:
            self.observe(x)
        y = F.linear(x, weight.to(x.dtype))
        return y if self.adapter is None else y + self.adapter(x)


class Table(nn.Module):
    """Rows looked up by integers; `project` is the tied head.

    weight: (rows, width). Only the head observes: the inputs of a look-up are integers.
    """

    def __init__(self, rows: int, width: int, part: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.tagged = {"weight": ("table", part)}
        self.layer: int | None = None
        self.fake_quant: Plug | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self.adapter: Plug | None = None

    def forward(self, index: Tensor) -> Tensor:
        """index: (...) integers -> (..., width)"""
        return F.embedding(index, self._weight())

    def project(self, x: Tensor) -> Tensor:
        """x: (..., width) -> (..., rows)"""
        if self.observe is not None:
            self.observe(x)
        y = F.linear(x, self._weight().to(x.dtype))
        return y if self.adapter is None else y + self.adapter(x)

    def _weight(self) -> Tensor:
        return self.weight if self.fake_quant is None else self.fake_quant(self.weight)
