"""The order of everything: which window is computed when, what it scores, and what may be learned after it.

A `Stream` is fixed before the first bit, by the spec and the lengths alone. Targets are numbered 0..N-1: target i is
token i+1 of the text, predicted from tokens 0..i. A window [start, stop) reads tokens start..stop-1 and scores the
targets first..stop-1.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fairway.base.errors import ContractError, DataError, RecipeError
from fairway.base.ranks import Ranks
from fairway.base.slots import kind_of, module_of

Index = npt.NDArray[np.int64]

# An unadapted stream has no chunks; it is cut into about this many units, so that the clock is read often enough to
# stop a run that will be late (3 % of the budget is lost at most).
_UNITS = 32


@dataclass(frozen=True)
class Windows:
    """Windows as three equal columns of target numbers, each (n,) int64; `first` ascends.

    start: the first position that is read; stop: one beyond the last; first: the first position that is scored.
    """

    start: Index
    stop: Index
    first: Index

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: slice) -> "Windows":
        return Windows(self.start[rows], self.stop[rows], self.first[rows])

    @property
    def scored(self) -> int:
        """The number of targets that these windows score."""
        return int((self.stop - self.first).sum())

    @property
    def positions(self) -> Index:
        """The targets that these windows score, in order: (scored,) int64."""
        count = self.stop - self.first
        skipped = self.first - (np.cumsum(count) - count)  # what a plain count up to each window leaves out
        return np.repeat(skipped, count) + np.arange(count.sum(), dtype=np.int64)

    def runs(self) -> Iterator["Windows"]:
        """Consecutive windows of equal length and equal number of scored targets, together."""
        shape = np.stack([self.stop - self.start, self.stop - self.first], axis=1)
        breaks = np.flatnonzero((shape[1:] != shape[:-1]).any(axis=1)) + 1
        for begin, end in zip([0, *breaks], [*breaks, len(self)], strict=True):
            if end > begin:
                yield self[begin:end]


@dataclass(frozen=True)
class Unit:
    """What is predicted and paid together, and what may be learned afterwards.

    windows: what is scored; update: training sequences over targets that are paid once this unit is (a sequence
    trains on all its targets), or None; stop: one beyond the last target paid by this unit and those before it.
    """

    index: int
    windows: Windows
    update: Windows | None
    stop: int

    def share(self, ranks: Ranks) -> "Unit":
        """This rank's contiguous part of the windows; the update is the same on all ranks."""
        return replace(self, windows=self.windows[ranks.share(len(self.windows))])


class Stream:
    """The units of a text of `targets` targets, in order.

    context: T, tokens of a window; windows: the Spec of a technique of score/windows; chunk: K, targets between two
    updates, or 0 where nothing is learned; block: windows that are computed at once, the least an unadapted unit has.
    Raises RecipeError for an impossible shape, ContractError for a window technique that does not score each target
    exactly once, DataError for a text without a target.
    """

    def __init__(self, targets: int, context: int, windows: Any, chunk: int = 0, block: int = 1) -> None:
        if targets < 1:
            raise DataError(f"text of {targets + 1} tokens: nothing to predict; give at least one byte of text")
        if context < 1 or chunk < 0:
            raise RecipeError(f"score: context = {context}, chunk = {chunk}: positive numbers of tokens are expected")
        try:
            self.windows: Windows = module_of(windows).windows(targets, context, windows)
        except ValueError as error:
            raise RecipeError(f"score.windows: {error}") from error
        self.targets, self.context, self.chunk = targets, context, chunk
        _each_target_once(self.windows, targets, context, kind_of(windows))
        for column in (self.windows.start, self.windows.stop, self.windows.first):
            column.flags.writeable = False  # no predictor moves a window while the stream runs
        first = self.windows.first
        if chunk:
            edges = np.searchsorted(first, np.arange(0, targets, chunk))
        else:
            edges = np.arange(0, len(first), max(-(-len(first) // _UNITS), block, 1))
        self._edges = np.append(edges, len(first))

    def __len__(self) -> int:
        """The number of units: chunks, where something is learned."""
        return len(self._edges) - 1

    def __iter__(self) -> Iterator[Unit]:
        stop = 0
        for index in range(len(self)):
            windows = self.windows[self._edges[index] : self._edges[index + 1]]
            stop = max(stop, int(windows.stop[-1])) if len(windows) else stop
            yield Unit(index, windows, self._update(index), stop)

    def _update(self, index: int) -> Windows | None:
        """The training sequences of chunk `index`; None for the last chunk, which nothing is scored after."""
        if not self.chunk or index == len(self) - 1:
            return None
        end = (index + 1) * self.chunk  # a chunk that is not the last is whole
        start = np.arange(index * self.chunk, end, self.context, dtype=np.int64)
        return Windows(start, np.minimum(start + self.context, end), start)


def optimizer_steps(stream: Stream, epochs: int, batch: int) -> int:
    """Optimiser steps of a chunked adaptation: `epochs` passes over each update in batches of `batch` sequences."""
    return sum(epochs * -(-len(unit.update) // batch) for unit in stream if unit.update is not None)


def _each_target_once(windows: Windows, targets: int, context: int, kind: str) -> None:
    start, stop, first = windows.start, windows.stop, windows.first
    once = len(first) > 0 and first[0] == 0 and stop[-1] == targets and bool((first[1:] == stop[:-1]).all())
    shaped = bool(((start >= 0) & (start <= first) & (first < stop) & (stop - start <= context)).all())
    if not (once and shaped):
        raise ContractError(
            f"score/windows/{kind}: {targets} targets at context {context} are not each scored exactly once, in order"
        )
