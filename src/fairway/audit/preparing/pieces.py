"""A SentencePiece processor that cuts: pieces of up to six letters, marks of spaces, bytes of what it does not know."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from fairway.audit.preparing.documents import DOCUMENTS
from fairway.audit.trial.arrays import Array, scalar
from fairway.audit.trial.values import UNKNOWN, Class, Obj, Value
from fairway.audit.trial.vocabulary import FIRST_BYTE, FIRST_PIECE, MARK, Processor

SIZE = 4_096
_CUT = re.compile(rf"{MARK}?[^\W\d_]{{1,6}}|{MARK}|.", re.DOTALL)
_LAST = 0x24F  # the last sign that has pieces of its own: Latin letters; others are bytes
_PRIVATE = ("\ue000", "\uf8ff")


def _cut(text: str, prefix: bool) -> list[str]:
    return _CUT.findall(MARK * prefix + text.replace(" ", MARK)) if text else []


def _spelt(piece: str) -> bool:
    """Whether a piece has an id of its own; else its bytes have."""
    return all(ord(sign) <= _LAST or sign == MARK or _PRIVATE[0] <= sign <= _PRIVATE[1] for sign in piece)


@cache
def _pieces(prefix: bool) -> tuple[str, ...]:
    """All pieces that the documents are cut into, as they are and as they are often changed; the mark is the first."""
    found: dict[str, None] = {MARK: None}
    for document in DOCUMENTS:
        for form in (document.text, unicodedata.normalize("NFKC", document.text)):
            for text in (form, form.lower(), form.upper(), form.title()):
                found.update(dict.fromkeys(piece for piece in _cut(text, prefix) if _spelt(piece)))
    found.update(dict.fromkeys(map(chr, range(32, 127))))
    return tuple(found)


class Cutter(Processor):
    """sentencepiece.SentencePieceProcessor. Pieces that no document has are added as they come: tables over the
    vocabulary do not know them."""

    def __init__(self, size: int, marks: str = "", prefix: bool = True) -> None:
        """marks: signs that have pieces of their own beforehand; prefix: whether a text begins with a mark that stands
        for no space of it."""
        super().__init__(size)
        self.prefix = prefix
        self._list = [*dict.fromkeys((*_pieces(prefix), *marks))]
        self._ids = {piece: FIRST_PIECE + n for n, piece in enumerate(self._list)}
        self._size = max(min(size, SIZE), FIRST_PIECE + len(self._list) + 64)

    def id_to_piece(self, index: Value) -> Value:
        n = scalar(index)
        if isinstance(n, list):
            return [self.id_to_piece(each) for each in n]
        if not isinstance(n, int) or n < FIRST_PIECE:
            return super().id_to_piece(index)
        at = n - FIRST_PIECE
        return self._list[at] if at < len(self._list) else f"\ufffd{at}"

    IdToPiece = id_to_piece

    def piece_to_id(self, piece: Value) -> Value:
        if not isinstance(piece, str):
            return UNKNOWN
        if len(piece) == 1 and _PRIVATE[0] <= piece <= _PRIVATE[1]:
            return self._id(piece)
        control = {"<unk>": 0, "<s>": 1, "</s>": 2}
        return control.get(piece, self._ids.get(piece, 0))

    PieceToId = piece_to_id

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = FIRST_PIECE + len(self._list)
            self._list.append(piece)
        return self._ids[piece]

    def ids(self, text: str) -> list[int]:
        found: list[int] = []
        for piece in _cut(text, self.prefix):
            if _spelt(piece):
                found.append(self._id(piece))
            else:
                for sign in piece:
                    found += [self._id(sign)] if _spelt(sign) else [FIRST_BYTE + byte for byte in sign.encode()]
        return found

    def encode(
        self, text: Value, *kinds: Value, add_bos: Value = False, add_eos: Value = False, **more: Value
    ) -> Value:
        kind = kinds[0] if kinds else more.get("out_type")
        if isinstance(text, (list, tuple)):
            return [self.encode(each, *kinds, add_bos=add_bos, add_eos=add_eos, **more) for each in text]
        if not isinstance(text, str):
            return UNKNOWN
        if any(isinstance(each, str) and each in _PROTOS for each in (kind, more.get("return_type"))):
            return Obj(_PROTO, {"text": text, "pieces": self.spans(text)})
        found = [1] * bool(add_bos) + self.ids(text) + [2] * bool(add_eos)
        spelt = getattr(kind, "name", kind) == "str"
        return [self.id_to_piece(each) for each in found] if spelt else found

    def spans(self, text: str) -> list[Value]:
        """The pieces of a text with the signs that each stands for: of the bytes of one sign, the last one has it, and
        the mark that is put before a text has none."""
        found: list[Value] = []
        at = 0

        def keep(number: int, many: int) -> None:
            nonlocal at
            surface = text[at : at + many]
            held = {"id": number, "piece": self.id_to_piece(number), "surface": surface, "begin": at, "end": at + many}
            found.append(Obj(_PROTO, held))
            at += many

        for piece in _cut(text, self.prefix):
            before = bool(self.prefix and not found)
            if _spelt(piece):
                keep(self._id(piece), len(piece) - before)
                continue
            for n, sign in enumerate(piece):
                octets = [] if _spelt(sign) else [FIRST_BYTE + byte for byte in sign.encode()]
                for number in octets[:-1]:
                    keep(number, 0)
                keep(octets[-1] if octets else self._id(sign), int(not before or n > 0))
        return found

    Encode = EncodeAsIds = encode_as_ids = tokenize = encode

    def encode_as_pieces(self, text: Value) -> Value:
        return [self.id_to_piece(each) for each in self.ids(text)] if isinstance(text, str) else UNKNOWN

    EncodeAsPieces = encode_as_pieces

    def decode(self, ids: Value, *_: Value, **__: Value) -> Value:
        """The text of pieces, as SentencePiece joins them."""
        if isinstance(ids, Array) and ids.num is not None:
            ids = ids.num.reshape(-1).tolist()
        ids = [ids] if isinstance(ids, int) else ids
        if not isinstance(ids, (list, tuple)):
            return UNKNOWN
        text = self.text(ids)
        return text.removeprefix(" ") if self.prefix else text

    Decode = DecodeIds = decode_ids = decode

    def text(self, ids: Iterable[Value]) -> str:
        """Of token ids, control tokens left out."""
        held = b""
        for n in ids:
            if FIRST_BYTE <= n < FIRST_PIECE:
                held += bytes([n - FIRST_BYTE])
            elif n >= FIRST_PIECE:
                held += str(self.id_to_piece(n)).replace(MARK, " ").encode()
        return held.decode(errors="replace")

    def sizes(self, ids: Iterable[int], marks: int, octets: int) -> int:
        """The bytes of pieces, where a mark and a byte token stand for so many."""
        total = 0
        for n in ids:
            if FIRST_BYTE <= n < FIRST_PIECE:
                total += octets
            elif n >= FIRST_PIECE:
                piece = str(self.id_to_piece(n))
                total += len(piece.replace(MARK, "").encode()) + marks * piece.count(MARK)
        return total


_PROTO = Class("SentencePieceText", [], {})
_PROTOS = frozenset(("immutable_proto", "serialized_proto", "proto"))
_MARKS = re.compile(r"\\u(e[0-9a-f]{3}|f[0-8][0-9a-f]{2})|([\ue000-\uf8ff])", re.IGNORECASE)
_BARE = re.compile(r"add_dummy_prefix[\"']?\s*[=:]\s*(?:False|false)")


def cutter_for(size: int, text: str) -> Cutter:
    """The processor that a script is given: with the signs that it names, and no prefix where it was trained so."""
    signs = (found[2] or chr(int(found[1], 16)) for found in _MARKS.finditer(text))
    return Cutter(size, "".join(dict.fromkeys(signs)), prefix=_BARE.search(text) is None)


__all__ = ["Cutter", "cutter_for"]
