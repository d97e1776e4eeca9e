"""Tokens of documents as SentencePiece gives them, to the last token, with each word encoded once and remembered.

A word here is a run of letters, or of anything else, with the spaces before it. Where no piece of a model reaches from
one word into the next, BPE merges (and unigram paths) stay within words too. The text is normalised whole by the
model's own rules, cut into words, and each word is looked up; only new words go through SentencePiece, with a copy of
the model that takes text as it is. On Wikipedia 97 % of the words are known, and a core does about 1.7 times as much.
"""

import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import sentencepiece

from fairway.data.splits import Uint16
from fairway.data.tokenizer import Tokenizer

REMEMBERED = 200_000  # words, about 30 MB for each process
LONGEST = 64  # characters of a word that is remembered
_SPACE = "\u2581"  # ▁, SentencePiece's space
_WINDOW = 1 << 20  # characters cut into words at once
# A ModelProto's field 3 again, which overrules the first: identity, no rules, nothing added, nothing removed, and
# spaces escaped (fields 1 to 5 of NormalizerSpec, sentencepiece_model.proto).
_AS_IT_IS = b"\x1a\x12" + b"\x0a\x08identity" + b"\x12\x00" + b"\x18\x00" + b"\x20\x00" + b"\x28\x01"


@dataclass(frozen=True, eq=False)
class Encoding:
    """tokens: (N,) uint16 without BOS; text: the bytes that they decode to after a BOS."""

    tokens: Uint16
    text: bytes


class Encoder:
    """A tokenizer at full speed in one thread. fast: whether it may go word by word."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        word = _word_of(tokenizer)
        self.fast = word is not None
        if word is not None:
            self._words = _Words(tokenizer, word)

    def encode(self, document: bytes) -> Encoding:
        """The tokens that `Tokenizer.encode` gives, and what they decode to. No UTF-8: the tokenizer's own way."""
        if self.fast and (not self.tokenizer.plain or self._is_plain(document)):
            return self._by_words(document.decode("utf-8", "replace"))
        tokens = np.concatenate([np.zeros(0, np.uint16), *self._in_parts(document)])
        return Encoding(tokens, self.tokenizer.decode(tokens, previous=self.tokenizer.bos))

    def _by_words(self, text: str) -> Encoding:
        normal = text.replace(" ", _SPACE) if self.tokenizer.plain else self.tokenizer._sp.normalize(text)
        tokens = np.frombuffer(b"".join(map(self._words.encode, _windows(normal))), dtype=np.uint16)
        if self._words.all_come_back:
            drops = self.tokenizer.drops_first_space and normal.startswith(_SPACE)
            return Encoding(tokens, normal[drops:].replace(_SPACE, " ").encode())
        return Encoding(tokens, self.tokenizer.decode(tokens, previous=self.tokenizer.bos))

    def _is_plain(self, document: bytes) -> bool:
        """Whether nothing in it goes straight to byte pieces."""
        try:
            return self.tokenizer._escaped.search(document.decode()) is None
        except UnicodeDecodeError:
            return False

    def _in_parts(self, document: bytes) -> Iterator[Uint16]:
        """`Tokenizer.encode_documents` in this thread alone: a build has a process for each core already."""
        for _, part in self.tokenizer._segments([document]):
            if isinstance(part, str):
                yield np.array(self.tokenizer._sp.encode(part, num_threads=1), dtype=np.uint16)
            else:
                yield self.tokenizer._byte_ids[np.frombuffer(part, dtype=np.uint8)].astype(np.uint16)


class _Words(dict[str, bytes]):
    """A word with the spaces before it -> its tokens, as the machine's 16-bit numbers."""

    def __init__(self, tokenizer: Tokenizer, word: re.Pattern[str]) -> None:
        super().__init__()
        self.word, self.pieces = word, tokenizer.pieces
        self.all_come_back = True  # every word so far decodes to itself
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model + _AS_IT_IS)

    def encode(self, normal: str) -> bytes:
        """The tokens of normalised text, all words of it."""
        return b"".join(map(self.__getitem__, self.word.findall(normal)))

    def __missing__(self, word: str) -> bytes:
        tokens = self._sp.encode(word)
        if b"".join([self.pieces[token] for token in tokens]) != word.replace(_SPACE, " ").encode():
            self.all_come_back = False
        found = array("H", tokens).tobytes()
        if len(self) < REMEMBERED and len(word) <= LONGEST:
            self[word] = found
        return found


def _windows(normal: str) -> Iterable[str]:
    """A long text in parts that begin with a space after none: a list of all words would take 60 bytes for each."""
    start = 0
    while len(normal) - start > _WINDOW:
        cut = normal.find(_SPACE, start + _WINDOW)
        while cut > 0 and normal[cut - 1] == _SPACE:
            cut = normal.find(_SPACE, cut + 1)
        if cut < 0:
            break
        yield normal[start:cut]
        start = cut
    yield normal[start:] if start else normal


def _word_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What finds the words that are encoded apart; None where they are not: a model without byte pieces (SentencePiece
    joins unknown neighbours), or with a piece that is more than one word."""
    ids = [
        token for token in range(tokenizer.size) if not tokenizer.boundary[token] and not tokenizer._sp.is_byte(token)
    ]
    texts = [tokenizer._sp.id_to_piece(token) for token in ids]
    known = {chr(code) for code in range(128)} | set("".join(texts)) - {_SPACE}
    letters = re.escape("".join(sorted(c for c in known if c.isalpha())))
    others = re.escape("".join(sorted(c for c in known if not c.isalpha())))
    word = re.compile(f"{_SPACE}*(?:[{letters}]+|[{others}]+|[^{letters}{others}{_SPACE}]+)|{_SPACE}+")
    return word if tokenizer.has_bytes and all(word.fullmatch(text) for text in texts) else None
