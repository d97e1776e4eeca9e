"""Sums of losses: which targets of the text count in a number, and how much each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

LATE: Final = 1 << 28
"""Added to a target's place where something that scores it had already learned from it."""
TAUGHT: Final = tuple(1 << bit for bit in range(17, 28))
"""Added as well, one for each of the first calls that learn: theirs was a step on that target before."""
FITTED: Final = 1 << 29
"""Added where a vector was fitted to this target in its own window, and SHARED where in any window."""
SHARED: Final = 1 << 30
PLACE: Final = TAUGHT[0] - 1
"""The bits of the place itself: the text has 40,961."""

_Flat = tuple[NDArray[np.int32], NDArray[np.float64]]
_MANY: Final = 64
"""Parts: a sum of fewer is worked out again where it is asked for, and holds no arrays of its own."""

_NONE: Final = (np.empty(0, np.int32), np.empty(0))


def _counted(
    places: NDArray[np.int32], weights: NDArray[np.float64], length: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One count for all leaves: a sum has thousands of them, and each count of its own cost two arrays of the text."""
    place = places & PLACE
    inside = (places >= 0) & (place < length)
    after = inside & (places & LATE != 0)
    total, late = (np.bincount(place[these], weights[these], length) for these in (inside, after))
    return np.abs(total).astype(np.float64), np.abs(late).astype(np.float64)


def _together(parts: list[_Flat], length: int) -> _Flat:
    """All in one pair of arrays, each target once where they are many more than the text has."""
    if not parts:
        return _NONE
    places, weights = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    if places.size <= 2 * length:
        return places, weights
    kept, which = np.unique(places, return_inverse=True)
    return kept, np.bincount(which.reshape(-1), weights).astype(np.float64)


LEAST: Final = 8
"""Tokens of a window: an axis of fewer is none of windows."""


class Rows(NamedTuple):
    """The windows whose losses a sum holds, one after the other: where each begins, how many of its losses count."""

    starts: NDArray[np.int32]
    counts: NDArray[np.int64]


class Sum:
    """sum over targets of weight x loss. Immutable; a sum of sums keeps them and is worked out once, at the end.
    way: the calls and the line that summed it, where one did; rows: its windows, where they are known; size: of the
    array that was summed, with what is of no place in the text."""

    __slots__ = ("flat", "parts", "places", "rows", "size", "way", "weights")

    def __init__(
        self,
        places: NDArray[np.int32] | None = None,
        weights: NDArray[np.float64] | None = None,
        parts: tuple[tuple[Sum, float], ...] = (),
        rows: Rows | None = None,
        size: int = 1,
    ) -> None:
        self.size = size
        self.places = places
        self.rows = rows
        self.weights = weights
        self.parts = parts
        self.flat: _Flat | None = None
        self.way: tuple[int, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether it is the loss of one target."""
        if not self.parts:
            return self.places is not None and self.places.size == 1
        leaves = [leaf.places for leaf in self.leaves() if leaf.places is not None]
        return len(leaves) == 1 and leaves[0].size == 1

    def leaves(self) -> Iterator[Sum]:
        """The sums of targets that it is made of, each once."""
        waiting, seen = [self], set[int]()
        while waiting:
            each = waiting.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            if each.places is not None:
                yield each
            waiting += [part for part, _ in each.parts]

    def made_of(self, other: Sum) -> bool:
        """Whether another sum is in it."""
        return any(each is other for each in self._before_their_parts())

    def ways(self) -> set[tuple[int, ...]]:
        """Those of everything in it."""
        return {leaf.way for leaf in self.leaves()}

    def taught(self) -> int:
        """The marks of TAUGHT that its targets have."""
        return int(np.bitwise_or.reduce(self._counting(), initial=0)) & ~PLACE & (LATE - 1)

    def elsewhere(self) -> bool:
        """Whether it is of tokens of another text: not of a context of none, nor of one whose tokens weigh nought."""
        leaves = [leaf for leaf in self.leaves() if leaf.places is not None]
        inside = any(leaf.places.size for leaf in leaves if leaf.places is not None)
        return not inside and any(leaf.size for leaf in leaves)

    def marked(self, mark: int) -> NDArray[np.int32]:
        """The places of its targets that have a mark."""
        counting = self._counting()
        found: NDArray[np.int32] = counting[counting & mark != 0] & PLACE
        return found

    def share(self, mark: int) -> float:
        """Of its targets: how many have a mark."""
        counting = self._counting()
        return float((counting & mark != 0).mean()) if counting.size else 0.0

    def _counting(self) -> NDArray[np.int32]:
        kept = [
            leaf.places[(leaf.weights != 0) & (leaf.places >= 0)].reshape(-1)
            for leaf in self.leaves()
            if leaf.places is not None and leaf.weights is not None
        ]
        return np.concatenate(kept) if kept else _NONE[0]

    def counts(self, length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each place of a text of `length` tokens: the weight in all, and that of late ones among it. What is taken
        from a sum takes from that of its targets; else signs say nothing, as a logarithm is told with either."""
        return _counted(*self._flat(length), length)

    def _flat(self, length: int) -> _Flat:
        """The targets of all leaves with what each weighs in this sum. A running total is told at every step: what was
        worked out for the one before is taken as it is, and given up there, as the next will ask for this one alone."""
        if self.flat is not None:
            return self.flat
        factors = {id(self): 1.0}
        kept = list[_Flat]()
        for each in self._before_their_parts(unless_flat=True):
            times = factors[id(each)]
            if each.flat is not None:
                kept.append((each.flat[0], each.flat[1] * times))
                each.flat = None
                continue
            if each.places is not None and each.weights is not None:
                kept.append((each.places.reshape(-1), np.abs(each.weights.reshape(-1)) * times))
            for part, factor in each.parts:
                factors[id(part)] = factors.get(id(part), 0.0) + times * factor
        made = _together(kept, length)
        if len(kept) > _MANY:
            self.flat = made
        return made

    def _before_their_parts(self, unless_flat: bool = False) -> list[Sum]:
        """All that it is made of, each once and before its parts: the ways to a part double with each step of a
        recurrence, `w = w * (1 - rate) + rate * w.mean()`. unless_flat: not the parts of what is worked out already."""
        done: list[Sum] = []
        seen: set[int] = set()
        waiting: list[tuple[Sum, bool]] = [(self, False)]
        while waiting:
            each, after = waiting.pop()
            if after:
                done.append(each)
            elif id(each) not in seen:
                seen.add(id(each))
                waiting.append((each, True))
                if not unless_flat or each.flat is None:
                    waiting += [(part, False) for part, _ in each.parts]
        return done[::-1]

    def scaled(self, factor: float) -> Sum:
        return Sum(parts=((self, abs(factor)),))

    def __add__(self, other: Any) -> Sum:
        return Sum(parts=((self, 1.0), (other, 1.0))) if isinstance(other, Sum) else self

    __radd__ = __rsub__ = __add__

    def __sub__(self, other: Any) -> Sum:
        return Sum(parts=((self, 1.0), (other, -1.0))) if isinstance(other, Sum) else self

    def __mul__(self, other: Any) -> Sum:
        """By a negative number it is taken from what it is added to: `sums += sign * first`."""
        return Sum(parts=((self, float(other)),)) if isinstance(other, (int, float, np.number)) else self

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Sum:
        ok = isinstance(other, (int, float, np.number)) and other
        return self.scaled(1.0 / float(other)) if ok else self

    def __neg__(self) -> Sum:
        return self

    def __pow__(self, other: Any) -> Sum:
        return self

    def __rtruediv__(self, other: Any) -> Sum:
        return self

    __rpow__ = __pow__
    __abs__ = __neg__

    def __format__(self, spec: str) -> str:
        return "0.0"


__all__ = ["FITTED", "LATE", "LEAST", "PLACE", "SHARED", "TAUGHT", "Rows", "Sum"]
