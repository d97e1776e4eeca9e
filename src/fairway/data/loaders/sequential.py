"""A contiguous stream from the first token to the last, and again from the first (TECHNIQUES: loaders 1)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fairway.data.splits import Uint16
from fairway.data.tokens import Tokens


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


@dataclass(frozen=True)
class Order:
    """windows: in one pass over the text; context: tokens that a window is wide."""

    windows: int
    context: int

    def rows(self, tokens: Tokens, first: int, count: int) -> Uint16:
        """(count, context + 1) tokens: windows number first .. first+count-1 of the run."""
        return tokens.stretches(self.starts(first, count), self.context + 1)

    def starts(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """(count,) positions: window n of the run begins at context · (n mod windows)."""
        return np.arange(first, first + count) % self.windows * self.context


def order(spec: Spec, tokens: Tokens, context: int, seed: int) -> Order:
    """A window's targets need one token more than its context."""
    return Order((len(tokens) - 1) // context, context)
