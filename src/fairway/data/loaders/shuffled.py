"""Aligned windows in a random order, drawn anew for each epoch together with a phase (TECHNIQUES: loaders 3, #1394).

Every window of an epoch is read once. The phase shifts all windows of an epoch by less than one context, so that a
token meets other neighbours, and another place in the window, in every epoch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fairway.base.devices import seed_for
from fairway.data.loaders import by_epoch
from fairway.data.splits import Uint16
from fairway.data.tokens import Tokens


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


@dataclass(frozen=True)
class Order:
    """windows: in an epoch; context: tokens that a window is wide; slack: the largest phase, tokens."""

    windows: int
    context: int
    slack: int
    seed: int

    def rows(self, tokens: Tokens, first: int, count: int) -> Uint16:
        """(count, context + 1) tokens: windows number first .. first+count-1 of the run."""
        return tokens.stretches(self.starts(first, count), self.context + 1)

    def starts(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """(count,) positions: window n of the run is the (n mod windows)-th of epoch n // windows."""
        found = list[npt.NDArray[np.int64]]()
        for epoch, here in by_epoch(first, count, self.windows):
            phase, permutation = _epoch(self.seed, epoch, self.windows, self.slack)
            found.append(phase + self.context * permutation[here])
        return np.concatenate(found)


def order(spec: Spec, tokens: Tokens, context: int, seed: int) -> Order:
    """As many windows as fit at any phase up to slack."""
    slack = min(context - 1, len(tokens) - 1 - context)
    return Order((len(tokens) - 1 - slack) // context, context, slack, seed)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, slack: int) -> tuple[int, npt.NDArray[np.int64]]:
    """(phase in 0..slack, a permutation (windows,)), from raw generator words, which no numpy version changes."""
    words = np.random.PCG64(seed_for(seed, f"loader/{epoch}")).random_raw(windows + 1)
    permutation = np.argsort(words[1:], kind="stable").astype(np.int64)
    return int(words[0]) % (slack + 1), permutation
