"""The tokenizer of case-transformed text (transforms/case.py): original bytes in, original bytes out.

Operators are tokens of 0 bytes. They are recognised by id, never in the joined text, so that the bytes of U+E001 that
come as byte pieces are three bytes of text and nothing else. All of it is a function of the tokens: a token's bytes are
the same whoever counts them, and they add up to what `decode` gives.
"""

import re
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fairway.base.errors import DataError
from fairway.data.tokenizer import Tokenizer
from fairway.data.transforms.case import CAPITALS, ESCAPE, NEXT, SYMBOLS, TITLE, apply

_BLOCK = 1 << 19  # tokens decoded at a time
_STOP, _ONE, _RUN = 1, 2, 3  # what a token does to the letters after it: none, the next one, all to the run's end
_SMALL = np.isin(np.arange(256), list(string.ascii_lowercase.encode()))  # (256,) of bytes
_LETTER = np.isin(np.arange(256), list(string.ascii_letters.encode()))


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) transforms case."""
    return bool(recipe["data"]["tokenizer"]["transform"]["kind"] == "case")


class Cased(Tokenizer):
    """A tokenizer whose pieces are those of transformed text, and whose bytes are those of the original."""

    def _tables(self) -> None:
        super()._tables()
        try:
            self._ids = dict(zip(SYMBOLS, (self.pieces.index(symbol.encode()) for symbol in SYMBOLS), strict=True))
        except ValueError as error:
            raise DataError(f"{self.name}: has some of the four case operators, not all; train it anew") from error
        self._operator = np.isin(np.arange(self.size), list(self._ids.values()))
        self.base[self._operator] = 0
        self._acts = np.where(self.boundary, _STOP, 0)
        for symbol, act in zip((TITLE, CAPITALS, NEXT, ESCAPE), (_ONE, _RUN, _ONE, _STOP), strict=True):
            self._acts[self._ids[symbol]] = act
        # Where no operator reaches across: behind a boundary, and behind a byte that is no letter.
        last = np.array([piece[-1] if piece else 0 for piece in self.pieces])
        self._settled = ~self._operator & ~_LETTER[last]
        # A run of letters is changed as a whole: no cut inside one. Elsewhere a capital is as its small letter.
        self._cuttable[65:91] = self._cuttable[97:123]
        self._cuttable[np.ix_(_LETTER, _LETTER)] = False
        # Operators that stand in the text go to byte pieces, as all that SentencePiece must not see.
        self._escaped = re.compile(self._escaped.pattern.replace("[", f"[{TITLE}-{ESCAPE}", 1))

    def _segments(self, documents: Iterable[bytes]) -> Iterator[tuple[bool, str | bytes]]:
        for ends, part in super()._segments(documents):
            yield ends, apply(part) if isinstance(part, str) else part

    def byte_lengths(self, tokens: npt.ArrayLike, previous: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Bytes of each token: 0 for an operator, and its own 3 where U+E004 stands before it."""
        lengths = super().byte_lengths(tokens, previous)
        return lengths + self._lengths[np.asarray(tokens, dtype=np.int64)] * self._literal(tokens, previous)

    def decode(self, tokens: npt.ArrayLike, previous: npt.ArrayLike | None = None) -> bytes:
        """The bytes of tokens (N,). previous: the token before, or all before, as far back as its operators reach."""
        ids = np.asarray(tokens, dtype=np.int64)
        before = np.atleast_1d(np.asarray(self.bos if previous is None else previous, dtype=np.int64))
        self._check_ids(ids)
        whole, start = np.concatenate((before[self._settled_before(before) :], ids)), len(ids)
        text = list[bytes]()
        for first in range(0, len(ids), _BLOCK):
            upto = len(whole) - start + first
            last = min(upto + _BLOCK, len(whole))
            text.append(self._raised(whole[self._settled_before(whole[:upto]) : last], last - upto))
        return b"".join(text)

    def _settled_before(self, ids: npt.NDArray[np.int64]) -> int:
        """Where decoding may begin so that it is right from the end of `ids` on: their last token that settles all."""
        for last in range(len(ids), 0, -4096):
            found = np.flatnonzero(self._settled[ids[max(0, last - 4096) : last]])
            if len(found):
                return max(0, last - 4096) + int(found[-1])
        return 0

    def _raised(self, ids: npt.NDArray[np.int64], last: int) -> bytes:
        """The bytes of the last so many of some tokens, capitals restored."""
        before = np.concatenate(([self.bos], ids[:-1]))
        lengths, literal = self.byte_lengths(ids, before), self._literal(ids, before)
        text = np.frombuffer(self._join(ids, None), dtype=np.uint8).copy()
        places = np.cumsum(lengths) - lengths  # the place of each token's first byte
        acts = self._acts[ids] * ~literal * (places < len(text))
        events = np.zeros(len(text), dtype=np.int64)
        events[places[acts > 0]] = acts[acts > 0]  # of several at one place the last acts
        # The last event up to a byte decides whether it stands in a run of capitals: odd where one begins.
        codes = np.arange(len(text)) * 2
        runs = np.where(_LETTER[text], np.where(events == _RUN, codes + 1, codes * (events > 0)), codes + 2)
        raised = (np.maximum.accumulate(runs) % 2 == 1) | (events == _ONE)
        text[raised & _SMALL[text]] -= 32
        return text[len(text) - int(lengths[len(ids) - last :].sum()) :].tobytes()

    def _literal(self, tokens: npt.ArrayLike, previous: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """(N,) whether a token is an operator's character as text: behind an odd number of U+E004 in a row."""
        ids, escaped = np.asarray(tokens, dtype=np.int64), np.asarray(previous) == self._ids[ESCAPE]
        if not escaped.any():
            return np.zeros(len(ids), dtype=np.bool_)
        numbers = np.arange(1, len(ids) + 1)
        behind = numbers - np.maximum.accumulate(np.where(escaped, 0, numbers))
        return self._operator[ids] & (behind % 2 == 1)
