"""A small SentencePiece vocabulary: control, byte and plain pieces, with and without the mark of a space."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairway.audit.trial.arrays import Array, scalar
from fairway.audit.trial.values import UNKNOWN, Value

FIRST_BYTE = 3
FIRST_PIECE = FIRST_BYTE + 256
PIECES = 1_024  # that the processor says it has: tables over many thousands of pieces would cost most of a trial
MARK = "\u2581"
_SIZE = re.compile(r"""vocab\w*["']?\s*[,:=]\s*(?:\w+\s*=\s*)?(?:int\()?["']?(\d{3,6})""", re.I)


def size_in(text: str) -> int:
    """The size that the script gives its vocabulary; 1,024 where it gives none."""
    found = _SIZE.search(text)
    return int(found[1]) if found else 1_024


class Processor:
    """sentencepiece.SentencePieceProcessor. Pieces after the bytes: every second begins a word; one is the mark alone,
    every fifth has a letter of two bytes."""

    def __init__(self, size: int, asked: Callable[[], None] = lambda: None) -> None:
        self._size = min(size, PIECES)
        self._asked = asked

    def load(self, *_: Value, **__: Value) -> bool:
        return True

    Load = LoadFromFile = load

    def vocab_size(self) -> int:
        return self._size

    get_piece_size = GetPieceSize = piece_size = __len__ = vocab_size

    def id_to_piece(self, index: Value) -> Value:
        self._asked()
        n = scalar(index)
        if isinstance(n, list):
            return [self.id_to_piece(each) for each in n]
        if not isinstance(n, int):
            return UNKNOWN
        if n < FIRST_BYTE:
            return ("<unk>", "<s>", "</s>")[n]
        if n < FIRST_PIECE:
            return f"<0x{n - FIRST_BYTE:02X}>"
        if n == FIRST_PIECE:
            return MARK
        word = "ab" + "\u00e9" * (n % 5 == 0) + "c" * (n % 4)
        return MARK + word if n % 2 else word

    IdToPiece = id_to_piece

    def is_byte(self, index: Value) -> bool:
        return FIRST_BYTE <= scalar(index) < FIRST_PIECE

    IsByte = is_byte

    def is_control(self, index: Value) -> bool:
        return scalar(index) in (1, 2)

    IsControl = is_control

    def is_unknown(self, index: Value) -> bool:
        return scalar(index) == 0

    IsUnknown = is_unknown

    def is_unused(self, index: Value) -> bool:
        return False

    IsUnused = is_unused

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def unk_id(self) -> int:
        return 0

    def pad_id(self) -> int:
        return -1

    def piece_to_id(self, piece: Value) -> Value:
        return {"<unk>": 0, "<s>": 1, "</s>": 2, MARK: FIRST_PIECE}.get(piece, 0)

    PieceToId = piece_to_id

    def decode(self, ids: Value, *_: Value, **__: Value) -> Value:
        """The text of pieces, as SentencePiece joins them."""
        if isinstance(ids, Array) and ids.num is not None:
            ids = ids.num.reshape(-1).tolist()
        ids = [ids] if isinstance(ids, int) else ids
        if not isinstance(ids, (list, tuple)) or not all(isinstance(each, int) for each in ids):
            return UNKNOWN
        held = b""
        for n in ids:
            if self.is_byte(n):
                held += bytes([n - FIRST_BYTE])
            elif n >= FIRST_PIECE:
                held += self.id_to_piece(n).replace(MARK, " ").encode()
        text = held.decode(errors="replace")
        return text.removeprefix(" ") if ids and ids[0] >= FIRST_PIECE else text

    Decode = DecodeIds = decode_ids = decode

    def encode(self, *_: Value, **__: Value) -> Value:
        return UNKNOWN


@dataclass(frozen=True)
class Octets:
    """Of each token of a text but its first: the bytes of its piece without the mark (of a byte token 1, of a control
    token 0), whether it is a byte token, whether of a byte that is no character by itself, whether it has the mark,
    and whether that stands for a space: not after a control token."""

    base: NDArray[np.int64]
    single: NDArray[np.bool_]
    broken: NDArray[np.bool_]
    mark: NDArray[np.bool_]
    space: NDArray[np.bool_]

    @property
    def true(self) -> NDArray[np.int64]:
        """The bytes of the text (RULES.md R7)."""
        return self.base + self.space


def octets(ids: NDArray[np.uint16], size: int) -> Octets:
    pieces = Processor(size)
    base = np.zeros(size, np.int64)
    mark = np.zeros(size, bool)
    single = np.zeros(size, bool)
    single[FIRST_BYTE : min(FIRST_PIECE, size)] = True
    base[single] = 1
    for n in range(FIRST_PIECE, size):
        piece = str(pieces.id_to_piece(n))
        mark[n] = piece.startswith(MARK)
        base[n] = len(piece.removeprefix(MARK).encode())
    after = ids[1:].astype(np.int64)
    broken = single & (np.arange(size) >= FIRST_BYTE + 128)
    return Octets(base[after], single[after], broken[after], mark[after], mark[after] & (ids[:-1] >= FIRST_BYTE))


__all__ = ["Octets", "Processor", "octets", "size_in"]
