"""Held-out documents that stand in the training text of a run: the figure in its journal, and its bound.

Text is compared as folded text. Shards are compared as tokens, document by document, and nothing is hashed whole: a
training document can be a held-out one only if its length and its first tokens are, and those few are compared in full.
That is one look at each token, as the check of the vocabulary is: 8 billion tokens need no cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fairway.data.overlap.folding import key_of
from fairway.data.overlap.minhash import ODD, Uint64, mixed
from fairway.data.tokens import Tokens

Positions: TypeAlias = npt.NDArray[np.int64]
_HEAD = 16  # tokens of a document that are looked at beside its length
_BLOCK = 1 << 24  # tokens searched for BOS together
_FACTORS: Uint64 = ODD[: _HEAD + 1]


@dataclass(frozen=True)
class Shared:
    """documents: held-out ones; shared: those of them that stand in the training text too; first: the number of the
    first of them, or -1; by: what was compared."""

    documents: int
    shared: int
    first: int
    by: str

    @property
    def share(self) -> float:
        return self.shared / self.documents if self.documents else 0.0


def shared_text(train: Sequence[bytes], held_out: Sequence[bytes]) -> Shared:
    """Compared by the hash of their folded text."""
    wanted = [key_of(document) for document in held_out]
    known = {key_of(document) for document in train}
    found = [number for number, key in enumerate(wanted) if key in known]
    return Shared(len(wanted), len(found), found[0] if found else -1, "folded text")


def shared_tokens(train: Tokens, held_out: Tokens, bos: int) -> Shared:
    """Compared token by token, from BOS to BOS; documents without a token are none."""
    none = np.zeros(0, dtype=np.int64)
    starts, ends = (np.concatenate(part) for part in zip((none, none), *_documents(held_out, bos), strict=True))
    heads = _heads(held_out, starts, ends)
    order = np.argsort(heads, kind="stable")
    heads, same = heads[order], np.zeros(len(starts), dtype=np.bool_)
    for train_starts, train_ends in _documents(train, bos):
        keys = _heads(train, train_starts, train_ends)
        first, last = (np.searchsorted(heads, keys, side=side) for side in ("left", "right"))
        for row in np.flatnonzero(last > first):
            alike = [number for number in order[first[row] : last[row]] if not same[number]]
            for number in alike:
                content = train.read(int(train_starts[row]), int(train_ends[row]))
                same[number] = np.array_equal(held_out.read(int(starts[number]), int(ends[number])), content)
    numbers = np.flatnonzero(same)
    return Shared(len(starts), len(numbers), int(numbers[0]) if len(numbers) else -1, "tokens")


def _documents(tokens: Tokens, bos: int) -> Iterator[tuple[Positions, Positions]]:
    """(starts, ends) of the documents, BOS left out, some thousands at a time; one may reach over several parts."""
    opened, begin = 0, 0  # the start of the document that is not ended yet; the position of the part's first token
    for part in tokens.parts:
        for first in range(0, len(part), _BLOCK):
            found = np.flatnonzero(part[first : first + _BLOCK] == bos) + (begin + first)
            starts = np.concatenate(([opened], found[:-1] + 1)) if len(found) else found
            opened = int(found[-1]) + 1 if len(found) else opened
            full = found > starts
            yield starts[full], found[full]
        begin += len(part)
    if opened < begin:
        yield np.array([opened]), np.array([begin])


def _heads(tokens: Tokens, starts: Positions, ends: Positions) -> Uint64:
    """(D,) uint64: a hash of each document's length and first tokens."""
    rows = np.zeros((len(starts), _HEAD + 1), dtype=np.uint64)
    lengths = ends - starts
    places = np.minimum(starts[:, None] + np.arange(_HEAD), (ends - 1)[:, None])
    part_ends = np.cumsum([len(part) for part in tokens.parts])
    homes = np.searchsorted(part_ends, starts, side="right")
    inside = places[:, -1] < part_ends[homes]
    for home in np.unique(homes[inside]):
        here = np.flatnonzero(inside & (homes == home))
        part = tokens.parts[home]
        rows[here, :_HEAD] = part[places[here] - (int(part_ends[home]) - len(part))]
    for row in np.flatnonzero(~inside):
        first = int(starts[row])
        rows[row, :_HEAD] = tokens.read(first, first + _HEAD)[places[row] - first]
    rows[:, _HEAD] = lengths
    return mixed((rows * _FACTORS).sum(axis=1, dtype=np.uint64))
