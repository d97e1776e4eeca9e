"""What a source hands over: training and held-out text, apart from the beginning, as documents or token shards."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Split: TypeAlias = Literal["train", "valid", "dev"]
Uint16: TypeAlias = npt.NDArray[np.uint16]

DEV_SHARE = 0.05  # of the training split, at its end


@dataclass(frozen=True, eq=False)
class Shard:
    """Part of one file of tokens, memory-mapped.

    tokens: (N,) uint16; first: the position of tokens[0] in the file's tokens, for messages.
    """

    path: Path
    tokens: Uint16
    first: int = 0


@dataclass(frozen=True, eq=False)
class Parts:
    """A source's whole text, divided. Either documents or shards are filled.

    cuts_documents: the source was told to divide by bytes, so that a document may be cut by a boundary.
    """

    train: tuple[bytes, ...] = ()
    valid: tuple[bytes, ...] = ()
    train_shards: tuple[Shard, ...] = ()
    valid_shards: tuple[Shard, ...] = ()
    cuts_documents: bool = False


def key_of(document: bytes) -> bytes:
    """What a document is recognised by: the sha256 of its content."""
    return hashlib.sha256(document).digest()


def share_of(document: bytes) -> float:
    """A number in [0, 1) that the content alone decides: equal documents always fall on the same side of a split."""
    return int.from_bytes(key_of(document)[:6], "big") / 2**48


def overlap(train: Sequence[bytes], held_out: Sequence[bytes]) -> list[int]:
    """The positions of held-out documents that stand, byte for byte, among the training documents too."""
    known = {key_of(document) for document in train}
    return [position for position, document in enumerate(held_out) if key_of(document) in known]


def divide_dev(documents: Sequence[bytes], cuts_documents: bool) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """(the rest, dev): dev is the last 5 % of the bytes, or the fewest whole documents at the end that hold as much."""
    wanted = int(DEV_SHARE * sum(map(len, documents)))
    rest, dev, held = list(documents), list[bytes](), 0
    while rest and held + len(rest[-1]) <= wanted:
        dev.append(rest.pop())
        held += len(dev[-1])
    if rest and held < wanted and cuts_documents:
        cut = len(rest[-1]) - (wanted - held)
        dev.append(rest[-1][cut:])
        rest[-1] = rest[-1][:cut]
    elif len(rest) > 1 and held < wanted:
        dev.append(rest.pop())
    return tuple(rest), tuple(reversed(dev))


def divide_dev_shards(shards: Sequence[Shard], bos: int) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """(the rest, dev): the last 5 % of the tokens, from the start of a document near there in that shard."""
    keep = sum(len(shard.tokens) for shard in shards) - int(DEV_SHARE * sum(len(shard.tokens) for shard in shards))
    rest, dev = list[Shard](), list[Shard]()
    for shard in shards:
        cut = min(keep, len(shard.tokens))
        keep -= cut
        if 0 < cut < len(shard.tokens):
            starts = np.flatnonzero(shard.tokens == bos)
            after, before = starts[starts >= cut], starts[(starts > 0) & (starts < cut)]
            cut = int(after[0] if len(after) else before[-1] if len(before) else cut)
        if cut:
            rest.append(Shard(shard.path, shard.tokens[:cut], shard.first))
        if cut < len(shard.tokens):
            dev.append(Shard(shard.path, shard.tokens[cut:], shard.first + cut))
    return tuple(rest), tuple(dev)
