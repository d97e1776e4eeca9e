"""What token shards hold: documents, tokens, bytes, lengths, samples; every token is looked at once."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.data.building import sidecar
from fairway.data.shardsets import BOS, ShardSet, foreign
from fairway.data.splits import Shard
from fairway.data.tokenizer import Tokenizer
from fairway.data.tokens import Tokens

_BLOCK = 1 << 22  # tokens looked at together
_SHOWN = 64  # tokens of a sample that are decoded

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """The beginning of a document. number: among the set's documents; tokens: its length, without BOS."""

    number: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Inspection:
    """What a set of shards holds. Bytes are those that the tokens decode to, None without a tokenizer; original_bytes
    those of the text that they were made from, where a sidecar says so.

    lengths: (from, to, documents) of each step of the histogram of tokens in a document, BOS left out;
    before_first: tokens before the first BOS: the end of a document that began elsewhere; pieces: different tokens.
    """

    name: str
    shards: int
    tokens: int
    documents: int
    empty: int
    before_first: int
    pieces: int
    bytes: int | None
    original_bytes: int | None
    shortest: int
    median: float
    mean: float
    longest: int
    lengths: tuple[tuple[int, int, int], ...]
    samples: tuple[Sample, ...] = field(default=())

    @property
    def bytes_per_token(self) -> float | None:
        return None if self.bytes is None else self.bytes / self.tokens


def inspect(one: ShardSet, tokenizer: Tokenizer | None, samples: int = 3, run: Run | None = None) -> Inspection:
    """Reads a set of shards through. DataError where a token is not among the tokenizer's pieces, or a sidecar is not
    of these shards."""
    run, bos = run or Run(), tokenizer.bos if tokenizer else BOS
    counts, starts, spaceless, done, begin = np.zeros(65_536, np.int64), list[Positions](), 0, 0, 0
    before = True  # whether the token before is a boundary: the stream begins after one
    with run.meter("inspect", one.tokens, "tokens") as meter:
        for shard in one.shards:
            for first, block in _blocks(shard):
                seen = np.bincount(block, minlength=65_536)
                if tokenizer:
                    if seen[tokenizer.size :].any():
                        raise foreign(shard, first + int(np.argmax(block >= tokenizer.size)), tokenizer)
                    spaceless += _after_boundary(block, before, tokenizer)
                    before = bool(tokenizer.boundary[block[-1]])
                counts += seen
                starts.append(np.flatnonzero(block == bos) + (begin + first))
                done += len(block)
                meter.update(done)
            begin += len(shard.tokens)
    where = np.concatenate(starts)
    lengths = np.diff(np.append(where, one.tokens)) - 1
    return Inspection(
        name=one.name,
        shards=len(one.shards),
        tokens=one.tokens,
        documents=len(where),
        empty=int((lengths == 0).sum()),
        before_first=int(where[0]) if len(where) else one.tokens,
        pieces=int((counts > 0).sum()),
        bytes=_bytes(counts, spaceless, tokenizer) if tokenizer else None,
        original_bytes=_original_bytes(one, where),
        shortest=int(lengths.min()) if len(lengths) else 0,
        median=float(np.median(lengths)) if len(lengths) else 0.0,
        mean=float(lengths.mean()) if len(lengths) else 0.0,
        longest=int(lengths.max()) if len(lengths) else 0,
        lengths=histogram(lengths),
        samples=tuple(_samples(one, where, lengths, tokenizer, samples)) if tokenizer else (),
    )


def histogram(lengths: Positions) -> tuple[tuple[int, int, int], ...]:
    """(from, to, count): steps of powers of two, [from, to), from the first to the last that holds something."""
    if not len(lengths):
        return ()
    steps = np.frexp(lengths.astype(np.float64))[1].astype(np.int64)  # 0 -> 0, [2^(k-1), 2^k) -> k
    counts = np.bincount(steps)
    first = int(steps.min())
    return tuple(
        (1 << (step - 1) if step else 0, 1 << step, int(count)) for step, count in enumerate(counts) if step >= first
    )


def _blocks(shard: Shard) -> Iterator[tuple[int, npt.NDArray[np.uint16]]]:
    for first in range(0, len(shard.tokens), _BLOCK):
        yield first, np.asarray(shard.tokens[first : first + _BLOCK])


def _after_boundary(block: npt.NDArray[np.uint16], before: bool, tokenizer: Tokenizer) -> int:
    """Tokens whose leading space is none, since a boundary stands before them."""
    if not tokenizer.drops_first_space:
        return 0
    boundary = tokenizer.boundary[block]
    previous = np.concatenate(([before], boundary[:-1]))
    return int(tokenizer.lead[block[np.flatnonzero(previous)]].sum())


def _bytes(counts: Positions, spaceless: int, tokenizer: Tokenizer) -> int:
    """Σ count · bytes over the pieces, less the spaces that are none: what `count_bytes` adds up token by token."""
    whole = tokenizer.base + tokenizer.lead
    return int((counts[: tokenizer.size] * whole).sum()) - spaceless


def _original_bytes(one: ShardSet, where: Positions) -> int | None:
    """The sum over the sidecars, None unless every shard has one."""
    paths = [sidecar.path_of(shard.path) for shard in one.shards]
    if not all(path.exists() for path in paths):
        return None
    total = begin = 0
    for path, shard in zip(paths, one.shards, strict=True):
        rows, end = sidecar.read(path), begin + len(shard.tokens)
        inside = where[(where >= begin) & (where < end)] - begin
        if not np.array_equal(rows[:, sidecar.START], inside):
            raise DataError(
                f"{path}: its documents do not begin where {shard.path.name} has BOS; build the shards again"
            )
        total += int(rows[:, sidecar.BYTES].sum())
        begin = end
    return total


def _samples(one: ShardSet, where: Positions, lengths: Positions, tokenizer: Tokenizer, count: int) -> Iterator[Sample]:
    """The beginnings of documents, evenly spread."""
    tokens = Tokens(tuple(shard.tokens for shard in one.shards), "train", lambda: b"")
    for number in sorted({len(where) * i // max(count, 1) for i in range(count)} if len(where) else ()):
        start, length = int(where[number]) + 1, int(lengths[number])
        part = tokens.read(start, start + min(length, _SHOWN)) if length else np.zeros(0, np.uint16)
        yield Sample(number, length, tokenizer.decode(part, previous=tokenizer.bos).decode("utf-8", "replace"))
