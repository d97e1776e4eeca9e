"""How strongly hints are raised at the places of a text: what differs with the last token was set by that token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairway.audit.trial.arrays import Array
from fairway.audit.weighing.stream import PIECES

RAISING = frozenset(
    ("expm1", "log1p", "exp")
)  # log(1 + p (e^b - 1)) is what a bonus b on a hint of probability p costs
_MOST = 4_000  # numbers that are stored
_ROOM = 200_000  # numbers of bonuses, in all: 1.6 MB for each of nine runs


@dataclass
class Strengths:
    """Of one run. raised: the lines of bonuses, or of their prices, and the numbers; stored: the lines that wrote a
    number into one place of an array or a list, and the number, or several into an array, and what tells those apart;
    room: numbers that may still be kept."""

    raised: list[tuple[int, NDArray[Any]]] = field(default_factory=list)
    stored: list[tuple[int, float]] = field(default_factory=list)
    room: int = _ROOM

    def raise_(self, name: str, of: Array, line: int) -> None:
        """exp(of), expm1(of), log1p(of): what is no price of a token, and no logarithm of a probability."""
        num = of.num
        if num is None or num.dtype.kind != "f" or of.price is not None or of.net or not num.size:
            return
        row = num.shape[-1:] == (PIECES,)  # of the vocabulary: no bonus of one hint
        if not row and (name != "exp" or num.min() >= 0.0) and num.size <= self.room:
            self.room -= num.size
            self.raised.append((line, num.copy()))

    def store(self, new: float, line: int) -> None:
        if len(self.stored) < _MOST:
            self.stored.append((line, float(new)))

    def store_all(self, new: Array, line: int) -> None:
        """`boost[opens] *= 0.25`: of strengths what they come to in all, and of how many places."""
        num = new.num
        if num is not None and num.dtype.kind == "f" and new.pos is None and new.price is None and not new.net:
            self.store(float(np.nansum(num)) + 1e3 * num.size, line)


def stored_by_target(runs: Sequence[Strengths]) -> int:
    """Of runs over texts that differ in their last token: the first line that writes other numbers into an array; 0
    where none does."""
    return next((line for other in runs[1:] if (line := _origin(runs[0], other))), 0)


def set_by_target(runs: Sequence[Strengths]) -> int:
    """Of runs over texts that differ in their last token: the line that makes a bonus differ; 0 where none does."""
    first = runs[0]
    for other in runs[1:]:
        for (line, one), (line_b, two) in zip(first.raised, other.raised, strict=False):
            if line != line_b:
                break
            if not np.array_equal(one, two, equal_nan=True):
                return _origin(first, other) or line
    return 0


def _origin(one: Strengths, other: Strengths) -> int:
    """The first line that stored another number, or none in the one of them."""
    pairs = zip(one.stored, other.stored, strict=False)
    return next((a[0] for a, b in pairs if a != b), 0)


__all__ = ["RAISING", "Strengths", "set_by_target", "stored_by_target"]
