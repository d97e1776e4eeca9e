"""Tokens of documents as SentencePiece gives them, to the last token, with each word encoded once and remembered.

A word here is a run of letters or of signs with the spaces before it, or all up to the next space. Where no piece of a
model reaches from one word into the next, BPE merges (and unigram paths) stay within words too. The text is normalised
whole by the model's own rules, cut into words, and each word is looked up; only new words go through SentencePiece,
with a copy of the model that takes text as it is. On Wikipedia 97 % of the words are known.
"""

import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import sentencepiece

from fairway.data.splits import Uint16
from fairway.data.tokenizer import Tokenizer

REMEMBERED = 200_000  # words, about 30 MB for each process
LONGEST = 64  # characters of a word that is remembered
_SPACE = "\u2581"  # ▁, SentencePiece's space
_CHUNK = 1 << 15  # characters of a word that are encoded in one call
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
    """A tokenizer at full speed in one thread. words: what encodes word by word, None where that cannot be."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        word = _word_of(tokenizer)
        self.words = None if word is None else _Words(tokenizer, word)
        self._untransformed = type(tokenizer) is Tokenizer

    def encode(self, document: bytes) -> Encoding:
        """The tokens that `Tokenizer.encode` gives, and what they decode to."""
        tokenizer, words = self.tokenizer, self.words
        if words is not None and self._untransformed and (not tokenizer.plain or self._has_nothing_escaped(document)):
            normal = self._normal(document.decode("utf-8", "replace"))
            tokens = self._of_words(normal, words)
            if words.all_come_back:  # the text needs no decoding: it is that of the words
                dropped = tokenizer.drops_first_space and normal.startswith(_SPACE)
                return Encoding(tokens, normal[dropped:].replace(_SPACE, " ").encode())
        else:
            tokens = np.concatenate([np.zeros(0, np.uint16), *self._in_parts(document)])
        return Encoding(tokens, tokenizer.decode(tokens, previous=tokenizer.bos))

    def _in_parts(self, document: bytes) -> Iterator[Uint16]:
        """`Tokenizer.encode_documents` in this thread alone: a build has a process for each core already."""
        for _, part in self.tokenizer._segments([document]):
            if isinstance(part, bytes):
                yield self.tokenizer._byte_ids[np.frombuffer(part, dtype=np.uint8)].astype(np.uint16)
            elif self.words is not None:
                yield self._of_words(self._normal(part), self.words)
            else:
                yield np.array(self.tokenizer._sp.encode(part, num_threads=1), dtype=np.uint16)

    def _normal(self, text: str) -> str:
        """The text as the model's rules make it, ▁ for spaces."""
        normal: str = text.replace(" ", _SPACE) if self.tokenizer.plain else self.tokenizer._sp.normalize(text)
        return normal

    def _of_words(self, normal: str, words: "_Words") -> Uint16:
        return np.frombuffer(b"".join(map(words.encode, _windows(normal))), dtype=np.uint16)

    def _has_nothing_escaped(self, document: bytes) -> bool:
        """Whether SentencePiece may see all of it."""
        try:
            return self.tokenizer._escaped.search(document.decode()) is None
        except UnicodeDecodeError:
            return False


class _Words(dict[str, bytes]):
    """A word with the spaces before it -> its tokens, as the machine's 16-bit numbers."""

    def __init__(self, tokenizer: Tokenizer, word: re.Pattern[str]) -> None:
        super().__init__()
        self.word, self.pieces = word, tokenizer.pieces
        texts = (tokenizer._sp.id_to_piece(token) for token in range(tokenizer.size))
        self.pairs = {a + b for text in texts for a, b in pairwise(text)}
        self.all_come_back = True  # every word so far decodes to itself
        self._sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model + _AS_IT_IS)

    def encode(self, normal: str) -> bytes:
        """The tokens of normalised text, all words of it."""
        return b"".join(map(self.__getitem__, self.word.findall(normal)))

    def __missing__(self, word: str) -> bytes:
        if len(word) > _CHUNK:  # as in a script without spaces: SentencePiece would take 100 bytes for each of its own
            return b"".join(map(self._encode, self._cut(word)))
        found = self._encode(word)
        if len(self) < REMEMBERED and len(word) <= LONGEST:
            self[word] = found
        return found

    def _encode(self, word: str) -> bytes:
        tokens = self._sp.encode(word)
        if b"".join([self.pieces[token] for token in tokens]) != word.replace(_SPACE, " ").encode():
            self.all_come_back = False
        return array("H", tokens).tobytes()

    def _cut(self, word: str) -> Iterator[str]:
        """The word in parts, cut between characters that stand side by side in no piece."""
        start, at = 0, _CHUNK
        while at < len(word):
            if word[at - 1 : at + 1] in self.pairs:
                at += 1
            else:
                yield word[start:at]
                start, at = at, at + _CHUNK
        yield word[start:]


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
    runs = rf"{_SPACE}*(?:[{letters}]+|[{others}]+|[^{letters}{others}{_SPACE}]+)|{_SPACE}+"
    for word in map(re.compile, (runs, f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")):
        if tokenizer.has_bytes and all(word.fullmatch(text) for text in texts):
            return word
    return None
