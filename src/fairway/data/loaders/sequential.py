"""A contiguous stream from the first token to the last, and again from the first (TECHNIQUES: loaders 1)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


@dataclass(frozen=True)
class Order:
    """windows: in one pass over the text; context: tokens that a window is wide."""

    windows: int
    context: int

    def starts(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """(count,) positions: window n of the run begins at context · (n mod windows)."""
        return np.arange(first, first + count) % self.windows * self.context


def order(spec: Spec, tokens: int, context: int, seed: int) -> Order:
    """The order over `tokens` tokens; a window's targets need one token more than its context."""
    return Order((tokens - 1) // context, context)
