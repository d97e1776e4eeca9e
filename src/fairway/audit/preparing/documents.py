"""The documents that a preparation is tried with: pairs that an easier text would make one, and signs of many bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PLAIN = "the ferry left the pier and the wind turned"
_PAIRS = (
    ("the case of letters", "Ann Went to THE Pier", "ann went to the pier"),
    ("the forms of signs", "ﬁve ½ ｗａｖｅｓ in the bay", "five 1⁄2 waves in the bay"),
    ("accents", "a café near the pier", "a cafe near the pier"),
    ("signs that are not ASCII", "one coin, 5€ or more", "one coin, 5 or more"),
    ("spaces that stand together", "wind  and   rain", "wind and rain"),
)
_OTHERS = (
    "Two boats, one crew: 日本 and 東京.",
    "Снег fell on the hills",
    "An emoji 🚢 at sea and ЖЖ",
    "He said NO. Then Yes, then MAYBE",
    "a plain line of small letters",
    "Numbers 1999 and 2024 stood there",
)
_LETTERS = "bcdfghjkmn"  # of the code's digits: what sets digits apart, or folds capitals, leaves them alone
_CODE = re.compile(rf"zq([{_LETTERS}]{{3}})q")
_MANY = 4  # of each kind


@dataclass(frozen=True)
class Document:
    """code: what is found again in its tokens, whatever folds or marks the text."""

    code: int
    text: str

    @property
    def size(self) -> int:
        """The bytes of the text (RULES.md R7)."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Pair:
    """Two documents that differ in nothing but their codes and one thing."""

    thing: str
    one: Document
    other: Document


def _spelt(code: int) -> str:
    return "zq" + "".join(_LETTERS[int(digit)] for digit in str(code)) + "q"


def _made() -> tuple[tuple[Document, ...], tuple[Pair, ...]]:
    documents: list[Document] = []
    pairs: list[Pair] = []

    def document(text: str) -> Document:
        code = 100 + len(documents)
        documents.append(Document(code, f"{_spelt(code)} {text} {_PLAIN[: code % 7 * 3].rstrip()}".rstrip()))
        return documents[-1]

    for _ in range(_MANY):
        for thing, one, other in _PAIRS:
            first = document(one)
            tail = first.text.removeprefix(f"{_spelt(first.code)} {one}")
            code = 100 + len(documents)
            second = Document(code, f"{_spelt(code)} {other}{tail}")
            documents.append(second)
            pairs.append(Pair(thing, first, second))
        for text in _OTHERS:
            document(text)
    return tuple(documents), tuple(pairs)


DOCUMENTS, PAIRS = _made()
BY_CODE = {document.code: document for document in DOCUMENTS}


def coded(text: str) -> list[tuple[int, str]]:
    """The documents that a text holds: the code of each, and what follows it up to the next."""
    parts = _CODE.split(text)
    codes = [int("".join(str(_LETTERS.index(letter)) for letter in code)) for code in parts[1::2]]
    return list(zip(codes, parts[2::2], strict=True))


__all__ = ["BY_CODE", "DOCUMENTS", "PAIRS", "Document", "Pair", "coded"]
