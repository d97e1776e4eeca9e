"""Documents in a random order, packed one after another and cut every context tokens (TECHNIQUES: loaders 4, #1530).

A document begins with BOS. In each epoch all of them are laid end to end in an order drawn anew, and window n holds
tokens n·context to (n+1)·context of that line: nothing is padded, and a document meets other neighbours, and other
cuts, in every epoch. With `model.apart` no position sees another document than its own: the attention that cu_seqlens
at BOS and at every cut describe.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fairway.base.devices import seed_for
from fairway.base.errors import DataError
from fairway.data.loaders import by_epoch
from fairway.data.splits import Uint16
from fairway.data.tokens import Tokens

_BLOCK = 1 << 24  # tokens searched for BOS at once

Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spec:
    bos: int = 1  # the token that begins a document, as model.bos


@dataclass(frozen=True, eq=False)
class Order:
    """starts, lengths: of the documents, (D,); windows: in an epoch; context: tokens that a window is wide."""

    starts: Index
    lengths: Index
    windows: int
    context: int
    seed: int

    def rows(self, tokens: Tokens, first: int, count: int) -> Uint16:
        """(count, context + 1) tokens: windows number first .. first+count-1 of the run."""
        found = list[Uint16]()
        for epoch, here in by_epoch(first, count, self.windows):
            line = self._line(tokens, epoch, here.start * self.context, here.stop * self.context + 1)
            found.append(np.lib.stride_tricks.sliding_window_view(line, self.context + 1)[:: self.context])
        return np.concatenate(found)

    def _line(self, tokens: Tokens, epoch: int, begin: int, end: int) -> Uint16:
        """Tokens begin .. end-1 of an epoch's line."""
        documents, ends = _epoch(self, epoch)
        low, high = (int(found) for found in np.searchsorted(ends, [begin, end - 1], side="right"))
        chosen, stops = documents[low : high + 1], ends[low : high + 1]
        skipped = np.maximum(begin - (stops - self.lengths[chosen]), 0)  # of the first document
        missing = np.maximum(stops - end, 0)  # of the last
        starts, stops = self.starts[chosen] + skipped, self.starts[chosen] + self.lengths[chosen] - missing
        return np.concatenate([tokens.read(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)])


def order(spec: Spec, tokens: Tokens, context: int, seed: int) -> Order:
    """Finds the documents: one pass over the text. DataError where nothing in it is BOS."""
    found, begin = [np.zeros(1, dtype=np.int64)], 0
    for part in tokens.parts:
        for first in range(0, len(part), _BLOCK):
            found.append(np.flatnonzero(part[first : first + _BLOCK] == spec.bos) + begin + first)
        begin += len(part)
    starts = np.unique(np.concatenate(found))  # the text begins a document, whatever it begins with
    if sum(map(len, found)) == 1:
        raise DataError(
            f"training text: no token {spec.bos} in it, which begins a document; set data.loader.bos and model.bos to "
            "the tokenizer's"
        )
    return Order(starts, np.diff(starts, append=len(tokens)), (len(tokens) - 1) // context, context, seed)


@lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> tuple[Index, Index]:
    """(the documents in their order, where each ends), from raw generator words, which no numpy version changes."""
    words = np.random.PCG64(seed_for(order.seed, f"documents/{epoch}")).random_raw(len(order.starts))
    documents = np.argsort(words, kind="stable")
    return documents, np.cumsum(order.lengths[documents])
