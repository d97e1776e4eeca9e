"""Bytes <-> tokens, without loss: SentencePiece BPE, with byte pieces for whatever the pieces cannot say.

SentencePiece writes a space as ▁, so that ▁ itself and bytes that are no UTF-8 cannot pass through it. They go straight
to byte pieces, and decoding joins the bytes of the pieces by a table of our own: any bytes come back exactly. A
tokenizer from elsewhere may normalise its text; it encodes as its makers meant it to, and `tokenize` finds out.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

from fairway.base.errors import DataError, HonestyError, RecipeError
from fairway.base.files import read
from fairway.base.slots import kind_of, optional
from fairway.base.specs import choice
from fairway.data.splits import Split, Uint16

_SPACE = "\u2581"  # ▁, SentencePiece's space
# What never enters SentencePiece: ▁, NUL, and the stand-ins of bytes that are no UTF-8.
_ESCAPED = "\u2581\x00\udc80-\udcff"
_CHUNK = 1 << 15  # bytes encoded in one call: large ones are slower (BPE's queue outgrows the processor's cache)
_GROUP = 1 << 23  # bytes handed to SentencePiece's threads at once
_CASED = b"\n\3\xee\x80\x81\x15\0\0\0\0\x18\4"  # in a SentencePiece model: U+E001 as a user-defined symbol
_PROBE = " a  b\n\tc\r\n ﬁ①Ａ e\u0301 \u3000 "  # what normalisers change: spaces, line ends, ligatures, wide letters


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer trained on the training split, or a given one."""

    # Pieces, 256 byte pieces and two control pieces among them; below 300 there are no byte pieces, and text is lost.
    vocab: int = 1024
    model: str = ""  # path of a SentencePiece .model to use as it is; "" = train one
    # Of the training text, evenly spread, that pieces are learned from. On 90 MB of Wikipedia 20 MB gave 0.05 % fewer
    # tokens than 8 MB, for 5.8 instead of 2.1 s and 0.5 GB more memory.
    sample_bytes: int = 8_000_000
    # Rarer characters go through byte pieces. At 1,024 pieces 0.99 is best of 0.9 to 1: 0.8 % fewer tokens
    # than 0.999 on the Python documentation, 0.3 % on Wikipedia (0.9: 9 and 11 % more).
    coverage: float = 0.99  # of the characters in the text
    # Pieces may hold a space inside ("▁of▁the"): 1.4 % fewer tokens on the Python documentation, 2.3 % on Wikipedia.
    across_words: bool = True
    longest_piece: int = 16  # characters
    transform: Any = choice("fairway.data.transforms", "none")  # of the text, before it is cut into pieces

    def __post_init__(self) -> None:
        if not 256 <= self.vocab <= 65_536:
            raise ValueError(f"vocab = {self.vocab}: 256 to 65,536 pieces are possible (tokens are stored in 16 bits)")
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage = {self.coverage}: more than 0 and at most 1 is possible")
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes = {self.sample_bytes}: at least one byte is needed")
        if not 1 <= self.longest_piece <= 512:
            raise ValueError(f"longest_piece = {self.longest_piece}: 1 to 512 characters are possible")


class Tokenizer:
    """A SentencePiece model and the bytes of its pieces.

    model: the serialised proto; size: number of pieces; bos: id of the piece before each document; pieces: the bytes of
    each token; base: (size,) int64 bytes without a leading space, lead: (size,) bool has one, boundary: (size,) bool
    control, unknown or unused. plain: the text is taken as it is; drops_first_space: a space after a boundary is none.
    Errors: DataError where the model is no SentencePiece model, or cannot serve here.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        try:
            self._sp: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"{name}: no SentencePiece model; name a .model file that is one") from error
        self.model, self.name = model, name
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.size, self.bos = int(self._sp.vocab_size()), int(self._sp.bos_id())
        if self.bos < 0:
            raise DataError(f"{name}: has no BOS piece, which begins every document; train it with bos_id >= 0")
        if not 1 <= self.size <= 65_536:
            raise DataError(f"{name}: {self.size:,} pieces do not fit into 16 bits; use one of at most 65,536")
        self._tables()
        self.plain = self._sp.normalize(_PROBE) == _PROBE.replace(" ", _SPACE)
        # A dummy prefix, or trimmed text: no document begins with a space of its own. (The challenge's byte tables.)
        self.drops_first_space = not self.plain

    @classmethod
    def from_bytes(cls, model: bytes, name: str = "tokenizer") -> "Tokenizer":
        """The tokenizer that a model is for: a model with case operators is one of transformed text (data/cased.py)."""
        return (optional("fairway.data.cased").Cased if _CASED in model else cls)(model, name)

    def _tables(self) -> None:
        sp, texts = self._sp, [self._sp.id_to_piece(i) for i in range(self.size)]
        self.boundary = np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(self.size)])
        is_byte = np.array([sp.is_byte(i) for i in range(self.size)])
        self.lead = np.array([text.startswith(_SPACE) for text in texts]) & ~is_byte & ~self.boundary
        self.pieces: list[bytes] = []
        self._byte_ids = np.full(256, -1, dtype=np.int64)
        for i, text in enumerate(texts):
            if is_byte[i]:
                value = int(text[3:5], 16)  # <0x41>
                self._byte_ids[value] = i
                self.pieces.append(bytes([value]))
            else:
                self.pieces.append(b"" if self.boundary[i] else text.replace(_SPACE, " ").encode())
        self.has_bytes = bool((self._byte_ids >= 0).all())
        self._lengths = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        self.base: npt.NDArray[np.int64] = self._lengths - self.lead
        self._pool = np.frombuffer(b"".join(self.pieces), dtype=np.uint8)
        self._starts = np.concatenate(([0], np.cumsum(self._lengths)))[:-1]
        # A model of text without spaces has no piece for one, and would fall back to the bytes of ▁.
        spaceless = not any(piece == b" " for piece, byte in zip(self.pieces, is_byte, strict=True) if not byte)
        self._escaped = re.compile(f"([{_ESCAPED}{' ' if spaceless else ''}]+)")
        self._cuttable = _cuttable(text for i, text in enumerate(texts) if not is_byte[i])

    def encode(self, data: bytes) -> Uint16:
        """The tokens of some bytes, (N,) uint16, without BOS."""
        return next(self.encode_documents([data]))

    def encode_exactly(self, data: bytes) -> Uint16:
        """Tokens that decode to exactly these bytes: `encode`, or byte pieces alone where the model normalises text.
        DataError where it has none."""
        tokens = self.encode(data)
        if self.decode(tokens, previous=self.bos) == data:
            return tokens
        if not self.has_bytes:
            raise DataError(f"{self.name}: cannot say this text, and has no byte pieces; use another artifact")
        return self._byte_ids[np.frombuffer(data, dtype=np.uint8)].astype(np.uint16)

    def encode_documents(self, documents: Iterable[bytes]) -> Iterator[Uint16]:
        """The tokens of each document, in order. Long documents are cut where no piece can reach across, so that the
        result is that of one call."""
        done: list[Uint16] = []
        for group in _grouped(self._segments(documents)):
            for ends, tokens in self._encode_group(group):
                done.append(tokens)
                if ends:
                    yield np.concatenate(done)
                    done = []

    def decode(self, tokens: npt.ArrayLike, previous: npt.ArrayLike | None = None) -> bytes:
        """The bytes of tokens (N,), joined by table. previous: the token before (none: a boundary), or all of them:
        what transformed text says may hang on more than one."""
        ids = np.asarray(tokens, dtype=np.int64)
        self._check_ids(ids)
        text, step = [], 1 << 20  # tokens at a time: the index arrays take 24 bytes for each byte of text
        for first in range(0, len(ids), step):
            text.append(self._join(ids[first : first + step], ids[first - 1] if first else previous))
        return b"".join(text)

    def byte_lengths(self, tokens: npt.ArrayLike, previous: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Bytes of each token after its previous one, both (N,): base, and one for a leading space that is text."""
        ids, before = np.asarray(tokens, dtype=np.int64), np.asarray(previous, dtype=np.int64)
        self._check_ids(ids)
        spaces = self.lead[ids]
        if self.drops_first_space:
            spaces = spaces & ~self.boundary[before]
        lengths: npt.NDArray[np.int64] = self.base[ids] + spaces
        return lengths

    def _join(self, ids: npt.NDArray[np.int64], previous: npt.ArrayLike | None) -> bytes:
        before = np.append(self.bos if previous is None else previous, ids)[-len(ids) - 1 : -1]
        lengths = self.byte_lengths(ids, before)
        starts = self._starts[ids] + self._lengths[ids] - lengths
        firsts = np.cumsum(lengths) - lengths  # the place of each token's first byte
        where = np.repeat(starts - firsts, lengths) + np.arange(int(lengths.sum()))
        return self._pool[where].tobytes()

    def _check_ids(self, ids: npt.NDArray[np.int64]) -> None:
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.size:
            at = int(np.flatnonzero((ids < 0) | (ids >= self.size))[0])
            raise DataError(
                f"token {int(ids[at])} at position {at}: {self.name} has {self.size:,} pieces; use its own tokens"
            )

    def _segments(self, documents: Iterable[bytes]) -> Iterator[tuple[bool, str | bytes]]:
        """(whether the document ends here, text for SentencePiece or bytes for byte pieces)."""
        for document in documents:
            if not self.plain:  # its normaliser wants the whole document, and its losses are its own
                yield True, document.decode("utf-8", "replace")
                continue
            for chunk in self._chunks(document):
                for i, part in enumerate(self._escaped.split(chunk.decode("utf-8", "surrogateescape"))):
                    if part and i % 2 and self.has_bytes:
                        yield False, part.encode("utf-8", errors="surrogateescape")
                    elif part:
                        yield False, part.encode("utf-8", errors="surrogateescape").decode("utf-8", "replace")
            yield True, b""

    def _chunks(self, document: bytes) -> Iterator[bytes]:
        """The document in parts of about 32 KB, cut between two ASCII characters that no piece holds side by side."""
        data, start, at = np.frombuffer(document, dtype=np.uint8), 0, _CHUNK
        while at < len(data):
            near = data[at - 1 : at + 4096].astype(np.int64)
            safe = np.flatnonzero(self._cuttable[near[:-1], near[1:]])
            if not len(safe):
                at += len(near) - 1
                continue
            cut = at + int(safe[0])
            yield document[start:cut]
            start, at = cut, cut + _CHUNK
        yield document[start:]

    def _encode_group(self, group: list[tuple[bool, str | bytes]]) -> Iterator[tuple[bool, Uint16]]:
        texts = [part for _, part in group if isinstance(part, str)]
        encoded = iter(self._sp.encode(texts, num_threads=min(8, os.cpu_count() or 1)) if texts else ())
        for ends, part in group:
            if isinstance(part, str):
                yield ends, np.array(next(encoded), dtype=np.uint16)
            else:
                yield ends, self._byte_ids[np.frombuffer(part, dtype=np.uint8)].astype(np.uint16)


def build(spec: TokenizerSpec, split: Split, documents: Sequence[bytes]) -> Tokenizer:
    """The tokenizer of a spec: the given model, or one trained on the documents, which must be training text."""
    if spec.model:
        return given(spec)
    if split != "train":
        raise HonestyError(f"tokenizer: asked to learn from the {split} split; it may learn from training text alone")
    if not documents:
        raise RecipeError("data.tokenizer.model: not set; token shards need the .model that they were made with")
    return Tokenizer.from_bytes(optional("fairway.data.learning").train(documents, spec))


def given(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer at spec.model. RecipeError where its size is not the one that the recipe states."""
    from pathlib import Path

    try:
        content = read(Path(spec.model))
    except DataError as error:
        raise DataError(f"data.tokenizer.model: {error}") from error
    tokenizer = Tokenizer.from_bytes(content, spec.model)
    if tokenizer.size != spec.vocab:
        raise RecipeError(
            f"data.tokenizer.vocab = {spec.vocab}: {spec.model} has {tokenizer.size} pieces; "
            f"set data.tokenizer.vocab = {tokenizer.size}"
        )
    if (told := kind_of(spec.transform)) != (found := "case" if _CASED in content else "none"):
        raise RecipeError(
            f"data.tokenizer.transform = {told!r}: by its pieces {spec.model} is one of {found!r}; set that"
        )
    return tokenizer


def _cuttable(pieces: Iterable[str]) -> npt.NDArray[np.bool_]:
    """(256, 256) bool: whether a text may be cut between two bytes: both ASCII, and side by side in no piece."""
    table = np.zeros((256, 256), dtype=np.bool_)
    table[:128, :128] = True
    for piece in pieces:
        codes = [ord(character) for character in piece.replace(_SPACE, " ")]
        for a, b in pairwise(codes):
            if a < 128 and b < 128:
                table[a, b] = False
    return table


def _grouped(segments: Iterable[tuple[bool, str | bytes]]) -> Iterator[list[tuple[bool, str | bytes]]]:
    group, held = list[tuple[bool, str | bytes]](), 0
    for segment in segments:
        group.append(segment)
        held += len(segment[1])
        if held >= _GROUP:
            yield group
            group, held = [], 0
    if group:
        yield group
