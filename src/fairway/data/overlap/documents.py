"""Documents as they are compared: the units of their shingles and the hash of the whole, a batch at a time.

Of text, a unit is a word of the folded text; of shards, a token. Shingles are of 5 words, of 8 tokens (of the
challenge's 1,024 pieces about 20 bytes, 4 words).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fairway.data.building.listing import shown
from fairway.data.building.reading import Block
from fairway.data.building.spec import BuildSpec
from fairway.data.building.work import originals
from fairway.data.overlap.folding import folded
from fairway.data.overlap.minhash import Uint64, mixed
from fairway.data.splits import Shard, Uint16

WORDS, TOKENS = 5, 8  # units of a shingle
BATCH = 1 << 20  # bytes of documents that are compared together
_SPACE = np.uint8(32)


@dataclass(frozen=True)
class Document:
    """Where a document stands, and what it is. place: file and number; content: its bytes (of tokens: two each)."""

    place: str
    content: bytes


@dataclass(frozen=True)
class Group:
    """Documents that are compared together. read: bytes of their source up to here, for the progress."""

    documents: tuple[Document, ...]
    read: int


@dataclass(frozen=True, eq=False)
class Batch:
    """A group's documents, cut. keys: of each, equal where documents are the same; units: (U,) uint64 of all, one after
    another; counts: (D,) units of each; width: units of a shingle."""

    group: Group
    keys: tuple[bytes, ...]
    units: Uint64
    counts: npt.NDArray[np.int64]
    width: int


def of_text(group: Group) -> Batch:
    """A batch of text, documents compared by their folded text; empty ones keep their place and have no units."""
    texts = [folded(document.content) for document in group.documents]
    keys = tuple(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    return Batch(group, keys, *_words(texts), WORDS)


def of_block(spec: BuildSpec, block: Block) -> Batch:
    """A batch of text from a block of files, as `fairway data build` reads them."""
    found = (
        Document(f"{shown(segment.name)}: {place}", content)
        for segment in block.segments
        for place, content in originals(segment, spec)
    )
    return of_text(Group(tuple(found), block.read))


def of_tokens(group: Group) -> Batch:
    """A batch of tokens: the contents are uint16, BOS left out."""
    contents = [document.content for document in group.documents]
    keys = tuple(hashlib.blake2b(content, digest_size=16).digest() for content in contents)
    tokens = np.frombuffer(b"".join(contents), dtype=np.uint16)
    counts = np.array([len(content) // 2 for content in contents], dtype=np.int64)
    return Batch(group, keys, mixed(tokens.astype(np.uint64) + np.uint64(1)), counts, TOKENS)


def of_shards(shards: Iterable[Shard], bos: int) -> Iterator[Document]:
    """The documents of shards as one stream, cut before each BOS: a document may go on in the next shard."""
    held, place = list[Uint16](), ""
    for shard in shards:
        tokens = shard.tokens
        starts = np.flatnonzero(tokens == bos)
        head = tokens[: starts[0]] if len(starts) else tokens
        if len(head):
            held.append(head)
            place = place or f"{shard.path}: document 0"
        for number, start in enumerate(starts.tolist()):
            if held:
                yield _joined(held, place)
            end = int(starts[number + 1]) if number + 1 < len(starts) else len(tokens)
            held, place = [tokens[start + 1 : end]], f"{shard.path}: document {number + 1}"
    if held:
        yield _joined(held, place)


def batched(documents: Iterable[Document]) -> Iterator[Group]:
    """Documents in groups of about BATCH bytes."""
    group, held, read = list[Document](), 0, 0
    for document in documents:
        group.append(document)
        held += len(document.content) + 64  # a million empty documents are not one group
        read += len(document.content)
        if held >= BATCH:
            yield Group(tuple(group), read)
            group, held = [], 0
    if group:
        yield Group(tuple(group), read)


def _joined(parts: list[Uint16], place: str) -> Document:
    return Document(place, b"".join(np.ascontiguousarray(part, dtype=np.uint16).tobytes() for part in parts))


def _words(texts: Sequence[bytes]) -> tuple[Uint64, npt.NDArray[np.int64]]:
    """(a hash of every word, (D,) words of each text): Σ value(byte) · B^place over the word, modulo 2^64, from one
    running sum over the whole batch."""
    data = np.frombuffer(b" ".join(texts) + b" ", dtype=np.uint8)
    spaces = np.flatnonzero(data == _SPACE)
    starts = np.concatenate(([0], spaces[:-1] + 1))
    powers, inverse = _powers(len(data))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(_VALUES[data] * powers, dtype=np.uint64)))
    hashes = mixed((sums[spaces] - sums[starts]) * inverse[starts])
    full = spaces > starts  # an empty text gives an empty word
    ends = np.cumsum([len(text) + 1 for text in texts]) - 1  # the space behind each text
    upto = np.searchsorted(spaces, ends, side="right")
    counts = np.diff(np.concatenate(([0], np.concatenate(([0], np.cumsum(full)))[upto])))
    return hashes[full], counts.astype(np.int64)


_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_VALUES: Uint64 = mixed(np.arange(1, 257, dtype=np.uint64))
_known: list[Uint64] = []  # the powers that were computed last: batches are of about one size


def _powers(count: int) -> tuple[Uint64, Uint64]:
    """B^i and B^-i for i < count."""
    if not _known or len(_known[0]) < count:
        inverse = pow(_BASE, -1, 1 << 64)
        for base in (_BASE, inverse):
            factors = np.full(count * 5 // 4, base, dtype=np.uint64)
            factors[0] = 1
            _known.append(np.cumprod(factors, dtype=np.uint64))
        del _known[:-2]
    return _known[0][:count], _known[1]
