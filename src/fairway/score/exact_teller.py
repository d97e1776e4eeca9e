"""The teller of exact mode."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.score import exact
from fairway.score.stream import Index
from fairway.score.tellers import Listener


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) scores in exact mode."""
    return bool(recipe["score"]["exact"])


class Exact:
    """The integer distributions of exact mode: what a coder is driven with, and what a decoder computes again."""

    def __init__(self, temperature: float = 1.0, listen: Listener | None = None) -> None:
        self.temperature, self.listen = temperature, listen

    def price(self, positions: Index, logits: Tensor, targets: Tensor) -> npt.NDArray[np.float64]:
        counts = exact.counts(exact.grid(logits, self.temperature))
        if self.listen is not None:
            self.listen(positions, (torch.as_tensor(counts).double() / exact.TOTAL).log())
        chosen = np.asarray(counts)[np.arange(len(positions)), targets.cpu().numpy()]
        return exact.prices(chosen)
