"""Tellers turn logits into distributions over the whole vocabulary, and say what the targets cost."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.score.stream import Index

Listener = Callable[[Index, Tensor], None]
"""(positions (n,), log-probabilities (n, vocab) float64): sees what is paid, returns nothing."""


class Teller(Protocol):
    """The one place where a target meets a distribution."""

    def price(self, positions: Index, logits: Tensor, targets: Tensor) -> npt.NDArray[np.float64]:
        """positions: (n,); logits: (n, vocab); targets: (n,) int64, on the logits' device -> nats (n,)."""
        ...


class Softmax:
    """Softmax in float64, every logit divided by a temperature that was fixed beforehand."""

    def __init__(self, temperature: float = 1.0, listen: Listener | None = None) -> None:
        self.temperature, self.listen = temperature, listen

    def price(self, positions: Index, logits: Tensor, targets: Tensor) -> npt.NDArray[np.float64]:
        chances = normalise(logits, self.temperature)
        if self.listen is not None:
            self.listen(positions, chances)
        return -chances.gather(1, targets[:, None])[:, 0].cpu().numpy()


def normalise(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities in nats over the whole vocabulary: (n, vocab) -> (n, vocab) float64."""
    return torch.log_softmax(logits.double() / temperature, dim=-1)
