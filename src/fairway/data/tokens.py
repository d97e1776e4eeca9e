"""A corpus as tokens, with every byte accounted for: encoded, decoded, compared, and counted by table."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from fairway.base import slots
from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.data import cache
from fairway.data.corpus import Corpus
from fairway.data.splits import Shard, Split, Uint16
from fairway.data.tokenizer import Tokenizer

CODE = 1  # of the encoding: raised when the same tokenizer would give other tokens
_CACHED_FROM = 8_000_000  # bytes of text; less is encoded faster (3 MB/s for each core) than it is worth keeping
_BLOCK = 1 << 22  # tokens looked at together


@dataclass(frozen=True, eq=False)
class Tokens:
    """BOS + document after document, as one or many arrays (a memory-mapped one for each shard).

    parts: each (n,) uint16; split: what the text may be used for; source: gives the bytes of targets tokens[1:];
    decoded: these bytes are what the tokens decode to, not known to be an original text; every score has to say so.
    """

    parts: tuple[Uint16, ...]
    split: Split
    source: Callable[[], bytes]
    decoded: bool = False

    @classmethod
    def of(cls, tokens: Uint16, split: Split, text: bytes, decoded: bool = False) -> "Tokens":
        """Tokens that are at hand, with their text."""
        return cls((tokens,), split, lambda: text, decoded)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def tokens(self) -> Uint16:
        """(N,) uint16, all parts; several parts are copied into memory."""
        return self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)

    @cached_property
    def text(self) -> bytes:
        """The bytes that are scored."""
        return self.source()

    @cached_property
    def text_bytes(self) -> int:
        return len(self.text)

    @cached_property
    def text_sha256(self) -> str:
        return hashlib.sha256(self.text).hexdigest()

    def read(self, start: int, stop: int) -> Uint16:
        """tokens[start:stop] without joining the parts."""
        first = min(int(np.searchsorted(self._ends, start, side="right")), len(self.parts) - 1)
        found, begin = list[Uint16](), int(self._ends[first - 1]) if first else 0
        for part in self.parts[first:]:
            if begin >= stop and found:
                break
            found.append(np.asarray(part)[max(0, start - begin) : max(0, stop - begin)])  # a memmap's slices are slow
            begin += len(part)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def stretches(self, starts: npt.NDArray[np.int64], width: int) -> Uint16:
        """tokens[start : start + width] for each start: (n, width). What lies in one part is copied at once."""
        found = np.empty((len(starts), width), dtype=np.uint16)
        homes = np.searchsorted(self._ends, starts, side="right")
        across = starts + width > self._ends[homes]
        for home in set(homes[~across].tolist()):
            rows = np.flatnonzero((homes == home) & ~across)
            part = np.asarray(self.parts[home])
            begin = int(self._ends[home]) - len(part)
            found[rows] = np.lib.stride_tricks.sliding_window_view(part, width)[starts[rows] - begin]
        for row in np.flatnonzero(across):
            found[row] = self.read(int(starts[row]), int(starts[row]) + width)
        return found

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.cumsum([len(part) for part in self.parts])


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, lossy: Literal["refuse", "score_decoded"] = "refuse", run: Run | None = None
) -> Tokens:
    """The tokens of a corpus, checked: they decode to its bytes, and the byte table counts as many.

    DataError names the first place where a tokenizer loses text (unless lossy = "score_decoded"), and the shard,
    position and value of a token that the vocabulary lacks.
    """
    run = run or Run()
    if corpus.shards:
        return _of_shards(corpus, tokenizer, run)
    tokens = _cached(corpus, tokenizer, run)
    text = _accounted(corpus.documents, tokens, tokenizer, lossy)
    if text is None:
        return Tokens((tokens,), corpus.split, lambda: b"".join(corpus.documents))
    return Tokens.of(tokens, corpus.split, text, decoded=True)


def count_bytes(tokens: Uint16, tokenizer: Tokenizer) -> int:
    """Bytes of the targets tokens[1:] by the byte table."""
    total = 0
    for first in range(1, len(tokens), _BLOCK):
        last = min(first + _BLOCK, len(tokens))
        total += int(tokenizer.byte_lengths(tokens[first:last], tokens[first - 1 : last - 1]).sum())
    return total


def check_bytes(tokens: Uint16, tokenizer: Tokenizer, text: bytes) -> None:
    """DataError, naming the token, where the byte table does not count exactly the bytes of the text."""
    if count_bytes(tokens, tokenizer) != len(text):
        raise miscounted(tokens, tokenizer, text)


def miscounted(tokens: Uint16, tokenizer: Tokenizer, text: bytes) -> DataError:
    """Names the first token that is not what the text has in its place: of other bytes, or of more or fewer."""
    at, place, step = 1, 0, 4096
    while at < len(tokens):
        ids, before = tokens[at : at + step], tokens[max(0, at - 4096) : at]
        length = int(tokenizer.byte_lengths(ids, tokens[at - 1 : at - 1 + len(ids)]).sum())
        piece = tokenizer.decode(ids, previous=before)
        if len(piece) == length and text.startswith(piece, place):
            at += step
            place += length
        elif step > 1:
            step = 1
        else:
            return DataError(
                f"{tokenizer.name}: token {ids[0]} at position {at} is counted as {length} bytes, but the text has "
                f"{text[place : place + 16]!r} at byte {place:,}; encode it with this tokenizer"
            )
    return DataError(
        f"{tokenizer.name}: the byte table counts {place:,} bytes, the text has {len(text):,}; tokens are missing"
    )


def _encode(corpus: Corpus, tokenizer: Tokenizer, run: Run) -> Uint16:
    """BOS + tokens of each document."""
    parts, done, bos = list[Uint16](), 0, np.array([tokenizer.bos], dtype=np.uint16)
    with run.meter("encode", corpus.bytes, "B") as meter:
        for document, tokens in zip(corpus.documents, tokenizer.encode_documents(corpus.documents), strict=True):
            parts += [bos, tokens]
            done += len(document)
            meter.update(done)
    return np.concatenate(parts)


def _cached(corpus: Corpus, tokenizer: Tokenizer, run: Run) -> Uint16:
    if corpus.bytes < _CACHED_FROM:
        return _encode(corpus, tokenizer, run)
    starts = np.cumsum([len(document) for document in corpus.documents])
    key = hashlib.sha256(f"{CODE} {corpus.sha256} {tokenizer.sha256} ".encode() + starts.tobytes()).hexdigest()
    stored = cache.load(f"tokens-{key[:32]}")
    if stored is not None:
        return np.frombuffer(stored, dtype="<u2").astype(np.uint16, copy=False)
    tokens = _encode(corpus, tokenizer, run)
    if run.ranks.first:
        cache.store(f"tokens-{key[:32]}", tokens.astype("<u2", copy=False).tobytes())
    return tokens


def _accounted(
    documents: Sequence[bytes], tokens: Uint16, tokenizer: Tokenizer, lossy: Literal["refuse", "score_decoded"]
) -> bytes | None:
    """None where the tokens decode to the documents, else the text they decode to."""
    text = tokenizer.decode(tokens[1:], previous=int(tokens[0]))
    original = b"".join(documents)
    if text != original and lossy == "refuse":
        raise _loss(documents, tokens, tokenizer)
    check_bytes(tokens, tokenizer, text)
    return None if text == original else text


def _loss(documents: Sequence[bytes], tokens: Uint16, tokenizer: Tokenizer) -> DataError:
    starts = np.flatnonzero(tokens == tokenizer.bos)
    if len(starts) != len(documents):
        return DataError(f"{tokenizer.name}: writes BOS inside a document; use another tokenizer")
    for number, (a, b) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True)):
        back, original = tokenizer.decode(tokens[a:b], previous=tokenizer.bos), documents[number]
        if back != original:
            at = _first_difference(original, back)
            return DataError(
                f"{tokenizer.name}: lossy on document {number}, byte {at:,}: {original[at : at + 12]!r} comes back as "
                f"{back[at : at + 12]!r}; use data.lossy = score_decoded (another text is scored), or another tokenizer"
            )
    raise AssertionError("called where every document comes back exactly")


def _first_difference(a: bytes, b: bytes) -> int:
    for first in range(0, min(len(a), len(b)), 4096):
        x, y = a[first : first + 4096], b[first : first + 4096]
        if x != y:
            return first + next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y)))
    return min(len(a), len(b))


def _of_shards(corpus: Corpus, tokenizer: Tokenizer, run: Run) -> Tokens:
    total, done = sum(len(shard.tokens) for shard in corpus.shards), 0
    with run.meter("check shards", total, "tokens") as meter:
        for shard in corpus.shards:
            for seen in _checked(shard, tokenizer):
                done += seen
                meter.update(done)
    parts = tuple(shard.tokens for shard in corpus.shards)
    tokens = Tokens(parts, corpus.split, lambda: _decoded(tokens.tokens, tokenizer), decoded=True)
    if corpus.split == "train":
        return tokens
    text = tokens.text
    check_bytes(tokens.tokens, tokenizer, text)
    known = slots.optional("fairway.data.originals").confirmed(corpus.shards, tokens.tokens, tokenizer, text, run)
    return Tokens(parts, corpus.split, lambda: text, decoded=not known)


def _checked(shard: Shard, tokenizer: Tokenizer) -> Iterator[int]:
    for first in range(0, len(shard.tokens), _BLOCK):
        block = shard.tokens[first : first + _BLOCK]
        if int(block.max()) >= tokenizer.size:
            at = int(np.argmax(block >= tokenizer.size))
            raise DataError(
                f"{shard.path}: token {int(block[at])} at position {shard.first + first + at:,} is not among the "
                f"{tokenizer.size:,} pieces of {tokenizer.name}; name the tokenizer that made these shards"
            )
        yield len(block)


def _decoded(tokens: Uint16, tokenizer: Tokenizer) -> bytes:
    return tokenizer.decode(tokens[1:], previous=int(tokens[0]))
