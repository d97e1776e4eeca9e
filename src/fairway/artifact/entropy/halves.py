"""Two-byte numbers that lie near one another: the rows' scales, and what is left in float16.

The highest ten bits of a number are one of 1,024 symbols, coded by how often it and its neighbours came lately; the
lowest six follow as they are: mantissas of trained numbers have no pattern. A float16's bits rise with its value, so
that neighbours in one are neighbours in the other.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from fairway.artifact.entropy import rans
from fairway.artifact.entropy.tables import Ints, quantised

BITS, RAW = 15, 6  # of the frequencies; of the numbers' uncoded end
SYMBOLS = 1 << (16 - RAW)
REACH = 3  # neighbours on each side that a number makes likelier
TURN, MEMORY = 8, 64  # numbers between two counts; numbers that are remembered, about
GAIN = 1 << 12


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe's file holds numbers coded so (its plain table): those of the coders that need numpy alone."""
    return recipe["pack"]["coder"]["kind"] in ("rans", "context")


class _Counts:
    """How likely each symbol is, after those that came; counted anew after every TURN of them."""

    def __init__(self) -> None:
        self.counts = np.full(SYMBOLS, GAIN // 64, dtype=np.int64)
        self.due: list[int] = []
        self._count()

    def _count(self) -> None:
        self.freqs = quantised(self.counts[None], BITS)[0].astype(np.uint32)
        self.starts = (np.cumsum(self.freqs) - self.freqs).astype(np.uint32)

    def add(self, symbol: int) -> None:
        self.due.append(symbol)
        if len(self.due) == TURN:
            self.counts -= self.counts * TURN // MEMORY
            for one in self.due:
                low, high = max(one - REACH, 0), min(one + REACH + 1, SYMBOLS)
                self.counts[low:high] += _kernel()[low - one + REACH : high - one + REACH]
            self.due.clear()
            self._count()


@cache
def _kernel() -> Ints:
    """A triangle."""
    return (REACH + 1 - np.abs(np.arange(-REACH, REACH + 1, dtype=np.int64))) * GAIN


def pack(raw: bytes) -> bytes:
    """raw: little-endian two-byte numbers, at most squeeze.MOST_NUMBERS."""
    numbers = np.frombuffer(raw, dtype="<u2").astype(np.int64)
    counts = _Counts()
    starts = np.empty((len(numbers), 2), dtype=np.uint32)
    freqs = np.full((len(numbers), 2), 1 << (BITS - RAW), dtype=np.uint32)
    starts[:, 1] = (numbers & ((1 << RAW) - 1)) << (BITS - RAW)
    for place, symbol in enumerate((numbers >> RAW).tolist()):
        starts[place, 0], freqs[place, 0] = counts.starts[symbol], counts.freqs[symbol]
        counts.add(symbol)
    return rans.encode(starts.reshape(-1), freqs.reshape(-1), [1] * starts.size, 1, BITS)


def unpack(blob: bytes, size: int) -> bytes:
    """The `size` bytes that were packed; ValueError for anything else."""
    if size % 2 or size > 2 * (1 << 15):
        raise ValueError(f"{size:,} bytes are no two-byte numbers, or too many")
    stream, counts = rans.Decoder(blob, 1, BITS), _Counts()
    numbers = np.empty(size // 2, dtype="<u2")
    even = np.full(1, 1 << (BITS - RAW), dtype=np.uint32)
    for place in range(len(numbers)):
        slot = stream.slots(1)
        symbol = int(counts.starts.searchsorted(slot, side="right")[0]) - 1
        stream.advance(slot, counts.starts[symbol : symbol + 1], counts.freqs[symbol : symbol + 1])
        slot = stream.slots(1)
        low = int(slot[0]) >> (BITS - RAW)
        stream.advance(slot, np.array([low << (BITS - RAW)], dtype=np.uint32), even)
        numbers[place] = symbol << RAW | low
        counts.add(symbol)
    stream.finish()
    return numbers.tobytes()
