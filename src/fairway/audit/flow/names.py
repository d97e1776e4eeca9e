"""What a path's name says: training or validation tokens."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

Side = Literal["train", "val", ""]

_VAL = frozenset(("val", "valid", "validation", "heldout", "eval"))
_TRAIN = frozenset(("train", "training"))


@lru_cache(4096)
def side_of(text: str) -> Side:
    """Which split the last part of a path that names one names; "" where none does."""
    for piece in reversed(text.replace("\\", "/").lower().split("/")):
        words = _words(piece)
        val, train = bool(words & _VAL), bool(words & _TRAIN)
        if val is not train:
            return "val" if val else "train"
    return ""


def names_a_split(piece: str) -> bool:
    """Whether a part of a path names training or validation, or both of them."""
    return bool(_words(piece.lower()) & (_VAL | _TRAIN))


def _words(piece: str) -> frozenset[str]:
    return frozenset("".join(char if char.isalpha() else " " for char in piece).split())


def sides_of(texts: Sequence[str]) -> tuple[Side, ...]:
    """Both splits where the last text that names one is a choice of two ("a|b"), else the one it names, else none."""
    for text in reversed(texts):
        sides = tuple(dict.fromkeys(side for part in text.split("|") if (side := side_of(part))))
        if sides:
            return sides
    return ()


def either(one: tuple[str, ...], other: tuple[str, ...], most: int) -> tuple[str, ...]:
    """The texts of one path or another; where they name different splits, a last text says so."""
    both = one + tuple(word for word in other if word not in one)
    mine, theirs = sides_of(one), sides_of(other)
    if mine and theirs and mine != theirs:
        both = (*both, f"{one[-1]}|{other[-1]}"[:400])
    return both[-most:]
