"""Range coder: symbols and their integer counts <-> bytes, at −log2(count / 2^24) bits each.

An interval of [0, 1) is narrowed symbol by symbol to the symbol's share of it (Martin 1979); 64-bit state, 32-bit
words. Two coders write the same words, bit for bit:

- constriction's (queue.RangeEncoder and RangeDecoder; Bamler 2022), where it is installed: the product; 33 million
  symbols encoded per second, 430,000 decoded at V = 2048.
- the one below in plain Python: the reference for tests, and the coder where constriction is missing (an exported
  script); 6 million encoded and 370,000 decoded per second on the same machine.

Both read zeros past the end of their words: a file that was cut short decodes to other symbols or raises ArtifactError,
and a checksum must tell. Nothing here checks counts: `exact.counts` makes them.
"""

from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fairway.base.errors import ArtifactError, ContractError

Ints = npt.NDArray[np.int64]

PRECISION = 24
TOTAL = 1 << PRECISION
_WORD = (1 << 32) - 1
_STATE = (1 << 64) - 1
_INVALID = "range coder: no encoder wrote these words for these counts; the file is damaged, or the weights are others"


class Encoder(Protocol):
    def encode(self, left: Ints, count: Ints) -> None:
        """Adds n symbols, in order. left: (n,) the counts before each symbol, summed; count: (n,) its own.
        ContractError unless 0 <= left, 1 <= count < TOTAL and left + count <= TOTAL."""

    def finish(self) -> bytes:
        """All words so far, little-endian uint32, at most 64 bits more than the symbols cost; b"" for no symbol."""


class Decoder(Protocol):
    def decode(self, counts: Ints) -> Ints:
        """The next n symbols, (n,) int64, from their counts (n, V): each at least 1, each row of sum TOTAL.
        ArtifactError where no encoder can have written the words. One wide call or many narrow ones are the same."""


def encoder() -> Encoder:
    """The fastest encoder that is installed."""
    found = _constriction()
    return ReferenceEncoder() if found is None else _ConstrictionEncoder(found)


def decoder(words: bytes) -> Decoder:
    """The fastest decoder that is installed. ArtifactError: bytes that are not whole words."""
    found = _constriction()
    return ReferenceDecoder(words) if found is None else _ConstrictionDecoder(found, words)


def name() -> str:
    """Which coder `encoder` and `decoder` give, for the journal: "constriction" or "python"."""
    return "python" if _constriction() is None else "constriction"


def intervals(counts: Ints, symbols: Ints) -> tuple[Ints, Ints]:
    """(left, count), each (n,) int64, of symbols (n,) under counts (n, V): what `encode` takes.
    ContractError: a symbol that is not in the vocabulary."""
    n, vocab = counts.shape
    if n == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if len(symbols) != n or symbols.min() < 0 or symbols.max() >= vocab:
        raise ContractError(f"range coder: {len(symbols)} symbols up to {symbols.max()} for counts {counts.shape}")
    begin = np.arange(0, n * vocab, vocab)
    # Sums from each row's first symbol to the one asked for, and from there to the row's end, in one pass.
    edges = np.stack([begin, begin + symbols], axis=1).reshape(-1)
    left = np.where(symbols > 0, np.add.reduceat(counts.reshape(-1), edges)[::2], 0)
    return left, counts.reshape(-1)[begin + symbols]


class ReferenceEncoder:
    """`Encoder` in plain Python, with numbers that do not overflow: a carry is added to the words already written."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self._lower, self._range = 0, _STATE

    def encode(self, left: Ints, count: Ints) -> None:
        _check(left, count)
        words, lower, span = self._words, self._lower, self._range
        for a, c in zip(left.tolist(), count.tolist(), strict=True):
            scale = span >> PRECISION
            lower += scale * a
            span = scale * c
            if lower > _STATE:
                lower &= _STATE
                _carry(words)
            if span <= _WORD:  # once is enough: span >= 2^32 >> 24 before, times 2^32 now
                words.append(lower >> 32)
                lower = (lower << 32) & _STATE
                span <<= 32
        self._lower, self._range = lower, span

    def finish(self) -> bytes:
        if self._range == _STATE:
            return b""
        words = list(self._words)
        # The first number of the interval whose lower word is 0, which need not be written. Only where the interval
        # ends before the next such number is it written: whatever follows in a file, no symbol changes.
        point = self._lower + _WORD
        if point > _STATE:
            _carry(words)
        word = point >> 32 & _WORD
        words.append(word)
        if (self._lower + self._range) >> 32 & _WORD == word:
            words.append(0)
        return _to_bytes(np.array(words, dtype=np.uint32))


class ReferenceDecoder:
    """`Decoder` in plain Python."""

    def __init__(self, words: bytes) -> None:
        self._words = iter(_from_bytes(words).tolist())
        self._lower, self._range = 0, _STATE
        self._point = next(self._words, 0) << 32 | next(self._words, 0)

    def decode(self, counts: Ints) -> Ints:
        symbols = np.empty(len(counts), dtype=np.int64)
        for row, own in enumerate(counts):
            right = own.cumsum()
            scale = self._range >> PRECISION
            quantile = (self._point - self._lower & _STATE) // scale
            if quantile >= TOTAL:
                raise ArtifactError(_INVALID)
            symbol = int(right.searchsorted(quantile, side="right"))
            count = int(own[symbol])
            self._lower = self._lower + scale * (int(right[symbol]) - count) & _STATE
            self._range = scale * count
            if self._range <= _WORD:
                self._lower = self._lower << 32 & _STATE
                self._range <<= 32
                self._point = self._point << 32 & _STATE | next(self._words, 0)
            symbols[row] = symbol
        return symbols


class _ConstrictionEncoder:
    """`Encoder` by constriction, from floats that it cannot round.

    Its fast model gives every symbol 1 count and shares the others out in proportion to the floats it is handed; those
    are our counts − 1, of sum TOTAL − (number of symbols), so that the proportion is exactly 1. The words depend on the
    interval alone, so a row has three symbols (before, the symbol, after) however large the vocabulary.
    """

    def __init__(self, constriction: ModuleType) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()
        self._model = constriction.stream.model.Categorical(perfect=False)

    def encode(self, left: Ints, count: Ints) -> None:
        _check(left, count)
        # A symbol at an edge that leaves only 1 to the others has no third part: a row of two. Vocabularies of 2 alone.
        thin = count == TOTAL - 1
        cuts = np.flatnonzero(thin[1:] != thin[:-1]) + 1
        for part in np.split(np.arange(len(count)), cuts) if thin.any() else [np.arange(len(count))]:
            if len(part):
                rows, symbols = _in_two(left[part]) if thin[part[0]] else _in_three(left[part], count[part])
                self._coder.encode(symbols, self._model, rows - 1.0)

    def finish(self) -> bytes:
        return _to_bytes(self._coder.get_compressed())


class _ConstrictionDecoder:
    """`Decoder` by constriction; float32 holds every count to 2^24."""

    def __init__(self, constriction: ModuleType, words: bytes) -> None:
        self._coder = constriction.stream.queue.RangeDecoder(_from_bytes(words))
        self._model = constriction.stream.model.Categorical(perfect=False)

    def decode(self, counts: Ints) -> Ints:
        rows = counts.astype(np.float32)
        rows -= 1
        try:
            symbols = self._coder.decode(self._model, rows)
        except AssertionError as error:  # its word for data that no encoder wrote
            raise ArtifactError(_INVALID) from error
        return np.asarray(symbols, dtype=np.int64)


def _in_three(left: Ints, count: Ints) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """(n, 3) counts and which of the three is the symbol. No part may be empty: at an edge the symbol comes first or
    last, and the other side is cut in 1 and the remainder."""
    rest = TOTAL - left - count
    first, last = left == 0, rest == 0
    rows = np.empty((len(left), 3))
    rows[:, 0] = np.where(first, count, left - last)
    rows[:, 1] = np.where(first | last, 1, count)
    rows[:, 2] = np.where(last, count, rest - first)
    return rows, 1 - first.astype(np.int32) + last


def _in_two(left: Ints) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """(n, 2) counts of symbols of count TOTAL − 1, and which of the two is the symbol."""
    symbols = left.astype(np.int32)  # 0 or 1: what is before is as long as the other's count
    return np.where(np.arange(2) == symbols[:, None], TOTAL - 1.0, 1.0), symbols


def _carry(words: list[int]) -> None:
    """Adds 1 to the number that the words write. Amortised constant: each word is passed by at most one carry."""
    place = len(words) - 1
    while words[place] == _WORD:
        words[place] = 0
        place -= 1
    words[place] += 1


def _check(left: Ints, count: Ints) -> None:
    if left.shape != count.shape or left.ndim != 1:
        raise ContractError(f"range coder: {left.shape} intervals of {count.shape} counts; give one (n,) for each")
    wrong = (left < 0) | (count < 1) | (count >= TOTAL) | (left + count > TOTAL)
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise ContractError(f"range coder: symbol {place} of count {count[place]} after {left[place]}, of {TOTAL}")


def _constriction() -> ModuleType | None:
    try:
        import constriction
    except ImportError:
        return None
    return constriction


def _to_bytes(words: npt.NDArray[np.uint32]) -> bytes:
    return words.astype("<u4").tobytes()


def _from_bytes(words: bytes) -> npt.NDArray[np.uint32]:
    if len(words) % 4:
        raise ArtifactError(f"range coder: {len(words)} bytes are no whole 32-bit words; the file is cut short")
    return np.frombuffer(words, dtype="<u4").astype(np.uint32)
