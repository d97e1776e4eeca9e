"""Coprime strides over many shards (TECHNIQUES: loaders 2, #726, #1060): no permutation of windows is ever drawn.

In each epoch a shard has a random phase below one context and is cut into blocks of one context; its k-th block is
number (start + k·stride) mod blocks, with a random start and a stride that shares no factor with the count of blocks.
The shards are interleaved evenly: block k of n has its turn at (k + u)/n of the epoch, with a random u in [0, 1) for
each shard, so that every batch holds a share of every shard. (The source draws 8 to 32 shards for a batch by what
remains of each, which hangs on all batches before it; here a batch is a function of its number.)
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np
import numpy.typing as npt

from fairway.base.devices import seed_for
from fairway.base.errors import DataError
from fairway.data.loaders import by_epoch
from fairway.data.splits import Uint16
from fairway.data.tokens import Tokens


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


@dataclass(frozen=True)
class Order:
    """shards: of each that holds a window (its first token, its tokens); windows: in an epoch; context: tokens."""

    shards: tuple[tuple[int, int], ...]
    windows: int
    context: int
    seed: int

    def rows(self, tokens: Tokens, first: int, count: int) -> Uint16:
        """(count, context + 1) tokens: windows number first .. first+count-1 of the run."""
        return tokens.stretches(self.starts(first, count), self.context + 1)

    def starts(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """(count,) positions: window n of the run is the (n mod windows)-th of epoch n // windows."""
        return np.concatenate([_epoch(self, epoch)[here] for epoch, here in by_epoch(first, count, self.windows)])


def order(spec: Spec, tokens: Tokens, context: int, seed: int) -> Order:
    """Over the parts of the text. DataError where none holds a window: windows do not cross from shard to shard."""
    ends = np.cumsum([len(part) for part in tokens.parts]).tolist()
    shards = tuple(
        (end - len(part), len(part)) for end, part in zip(ends, tokens.parts, strict=True) if len(part) > context
    )
    windows = sum(_blocks(length, context)[0] for _, length in shards)
    if not windows:
        raise DataError(
            f"training text: no shard of it holds a window of {context:,} tokens and its target; take longer shards, "
            "a shorter context, or data.loader = shuffled"
        )
    return Order(shards, windows, context, seed)


def _blocks(tokens: int, context: int) -> tuple[int, int]:
    """(blocks of a shard, its largest phase): as many as fit at any phase."""
    slack = min(context - 1, tokens - 1 - context)
    return (tokens - 1 - slack) // context, slack


@lru_cache(maxsize=2)
def _epoch(order: Order, epoch: int) -> npt.NDArray[np.int64]:
    """(windows,) where each begins, from raw generator words, which no numpy version changes."""
    words = np.random.PCG64(seed_for(order.seed, f"coprime/{epoch}")).random_raw(4 * len(order.shards))
    starts, turns = list[npt.NDArray[np.int64]](), list[npt.NDArray[np.float64]]()
    for (begin, length), word in zip(order.shards, words.reshape(-1, 4).tolist(), strict=True):
        blocks, slack = _blocks(length, order.context)
        number = np.arange(blocks)
        block = (word[1] % blocks + number * coprime(word[2], blocks)) % blocks
        starts.append(begin + word[0] % (slack + 1) + order.context * block)
        turns.append((number + (word[3] >> 11) / 2**53) / blocks)
    found: npt.NDArray[np.int64] = np.concatenate(starts)[np.argsort(np.concatenate(turns), kind="stable")]
    return found


def coprime(word: int, blocks: int) -> int:
    """A stride for so many blocks: from a random word, in the middle half, where neighbours in turn lie far apart."""
    stride = blocks // 4 + word % (blocks // 2 + 1)
    while gcd(stride, blocks) != 1:
        stride += 1
    return stride
