"""Vectors that are fitted to windows: which targets each window's own was fitted to, and which the others' were."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fairway.audit.trial.sums import FITTED, PLACE, SHARED, Sum

Places = NDArray[np.int32]

MAKERS: Final = frozenset({"zeros", "zeros_like", "empty", "ones", "full", "randn", "new_zeros"})
"""What makes a vector that remembers nothing of the one before it."""


class Fitting:
    """What vectors have learned since the last of them was made: by the place at which a window begins, and together.

    A vector has as many rows as there are windows, or one for all of them. Nobody knows which: a loss is marked FITTED
    where its own window's targets hold it, SHARED where any window's do. What is learned from losses whose windows
    nobody can tell is every window's.
    """

    def __init__(self) -> None:
        self.rows: dict[int, set[int]] = {}
        self.anyones: set[int] = set()
        self.together: set[int] = set()

    def made_anew(self) -> None:
        """A vector of nothing: it has learned nothing."""
        self.rows.clear()
        self.anyones.clear()
        self.together.clear()

    def learn(self, found: Sum) -> None:
        """A step on these losses. A window whose losses all weigh nought has learned nothing."""
        for leaf in found.leaves():
            if leaf.places is None or leaf.weights is None:
                continue
            places = leaf.places & PLACE
            taught = leaf.weights != 0
            self.together.update(places[taught].tolist())
            if leaf.rows is None:
                self.anyones.update(places[taught].tolist())
                continue
            ends = np.cumsum(leaf.rows.counts).tolist()
            for start, low, high in zip(leaf.rows.starts.tolist(), [0, *ends], ends, strict=False):
                self.rows.setdefault(start, set()).update(places[low:high][taught[low:high]].tolist())

    def marks(self, pos: Places, shape: tuple[int, ...]) -> Places:
        """Of losses that are being made: their marks. shape: of the windows, where they were made flat."""
        found = np.zeros(pos.shape, dtype=np.int32)
        if not self.together:
            return found
        flat, out = pos.reshape(-1), found.reshape(-1)
        for row in runs(flat, shape[-1] if len(shape) > 1 else 0):
            places = (flat[row] & PLACE).tolist()
            own = self.rows.get(places[0])
            mine = self.together if own is None else own | self.anyones
            out[row] = [FITTED * (each in mine) + SHARED * (each in self.together) for each in places]
        return found


def runs(places: Places, width: int = 0) -> Iterator[slice]:
    """Where the places of a text go on one by one: its windows, one after the other. width: tokens of a window where
    that is known, since one may begin where another ends."""
    bare = np.where(places >= 0, places & PLACE, -2)
    ends = np.flatnonzero(np.diff(bare) != 1) + 1
    if width and not places.size % width:
        ends = np.union1d(ends, np.arange(width, places.size, width))
    bounds = [0, *ends.tolist(), places.size]
    for low, high in itertools.pairwise(bounds):
        if high > low and bare[low] >= 0:
            yield slice(low, high)
