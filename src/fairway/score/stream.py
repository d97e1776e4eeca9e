"""The order of everything: which window is computed when, what it scores, and what may be learned after it.

A `Stream` is fixed before the first bit, by the spec and the lengths alone. Targets are numbered 0..N-1: target i is
token i+1 of the text. The text is cut into lanes, contiguous parts of equal length (the first ones take the remainder),
each of which begins with BOS and an empty past; input i is token i, but BOS where a lane begins. A window
[start, stop) lies in one lane, reads the inputs start..stop-1 and scores the targets first..stop-1.

Windows come in rounds, one window of every lane that is not at its end; within a round they are coded step by step,
lane by lane: that is the order in which a decoder gets to know the text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
    """Windows as equal columns of target numbers, each (n,) int64.

    start: the first position that is read; stop: one beyond the last; first: the first position that is scored;
    lane: which part of the text each lies in; turn: its round. Techniques of score/windows leave the last two out.
    """

    start: Index
    stop: Index
    first: Index
    lane: Index = field(default_factory=lambda: np.zeros(0, np.int64))
    turn: Index = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> "Windows":
        return Windows(self.start[rows], self.stop[rows], self.first[rows], self.lane[rows], self.turn[rows])

    @property
    def scored(self) -> int:
        """The number of targets that these windows score."""
        return int((self.stop - self.first).sum())

    @property
    def positions(self) -> Index:
        """The targets that these windows score, window by window: (scored,) int64."""
        count = self.stop - self.first
        skipped = self.first - (np.cumsum(count) - count)  # what a plain count up to each window leaves out
        return np.repeat(skipped, count) + np.arange(count.sum(), dtype=np.int64)

    @property
    def order(self) -> Index:
        """The targets that these windows score, in the order in which they are coded: (scored,) int64."""
        positions, count = self.positions, self.stop - self.first
        if not len(self):
            return positions
        step = positions - np.repeat(self.first, count)
        changes = _differ((self.stop - self.start, count, self.turn))
        shape = np.repeat(np.cumsum(np.append(0, changes)), count)  # windows of one round and shape, numbered
        return positions[np.lexsort((np.repeat(self.lane, count), step, shape))]

    def runs(self) -> Iterator["Windows"]:
        """Consecutive windows of equal length and equal number of scored targets, together."""
        yield from self._cut((self.stop - self.start, self.stop - self.first))

    def rounds(self) -> Iterator["Windows"]:
        """The same, but of one round at a time: what is decoded together."""
        yield from self._cut((self.stop - self.start, self.stop - self.first, self.turn))

    def _cut(self, columns: tuple[Index, ...]) -> Iterator["Windows"]:
        breaks = np.flatnonzero(_differ(columns)) + 1
        for begin, end in zip([0, *breaks], [*breaks, len(self)], strict=True):
            if end > begin:
                yield self[begin:end]


@dataclass(frozen=True)
class Unit:
    """What is predicted and paid together, and what may be learned afterwards.

    windows: what is scored; update: training sequences over targets that are paid once this unit is (a sequence
    trains on all its targets), or None; stop: (lanes,), one beyond the last target of each lane that this unit and
    those before it pay; done: how many targets that are.
    """

    index: int
    windows: Windows
    update: Windows | None
    stop: Index
    done: int

    def share(self, ranks: Ranks, lanes: int = 0) -> "Unit":
        """This rank's part of the windows, by whole lanes where their number is given; the update is every rank's."""
        if not lanes:
            return replace(self, windows=self.windows[ranks.share(len(self.windows))])
        mine = ranks.share(lanes)
        inside = (self.windows.lane >= mine.start) & (self.windows.lane < mine.stop)
        return replace(self, windows=self.windows[inside])


class Stream:
    """The units of a text of `targets` targets, in order.

    context: T, tokens of a window; windows: the Spec of a technique of score/windows; chunk: K, targets between two
    updates over all lanes, or 0 where nothing is learned; block: windows that are computed at once, the least an
    unadapted unit has; lanes: one where the text has fewer targets than lanes; whole: where only the
    first targets of every lane are taken (a slice), the number of targets of the whole text: lanes, windows and
    schedule are those of the whole.

    Raises RecipeError for an impossible shape, ContractError for a window technique that does not score each target
    exactly once, DataError for a text without a target.
    """

    def __init__(
        self,
        targets: int,
        context: int,
        windows: Any,
        chunk: int = 0,
        block: int = 1,
        lanes: int = 1,
        whole: int = 0,
    ) -> None:
        whole = whole or targets
        if targets < 1:
            raise DataError(f"text of {targets + 1} tokens: nothing to predict; give at least one byte of text")
        if context < 1 or chunk < 0 or lanes < 1 or whole < targets:
            raise RecipeError(
                f"score: context = {context}, chunk = {chunk}, lanes = {lanes}: positive numbers are expected, "
                f"and {targets} targets in a text of {whole}"
            )
        self.lanes = lanes if lanes <= whole else 1
        if chunk % self.lanes:
            raise RecipeError(
                f"score: chunk = {chunk} is no multiple of lanes = {self.lanes}; every lane gives its share"
            )
        self.targets, self.whole, self.context, self.chunk = targets, whole, context, chunk
        self.carried: bool = module_of(windows).CARRIED
        self.edges = edges_of(targets, self.lanes)
        self._share = chunk // self.lanes  # K of one lane
        self.windows = _laned(windows, context, self.edges, edges_of(whole, self.lanes), self.carried)
        for column in (self.windows.start, self.windows.stop, self.windows.first, self.windows.lane, self.windows.turn):
            column.flags.writeable = False  # no predictor moves a window while the stream runs
        self._cuts = self._cut(block)

    def __len__(self) -> int:
        """The number of units: chunks, where something is learned."""
        return len(self._cuts) - 1

    @property
    def chunks(self) -> int:
        """C, the number of units of the whole text: what a schedule counts with."""
        return -(-int(np.diff(edges_of(self.whole, self.lanes)).max()) // self._share) if self.chunk else len(self)

    @property
    def taken(self) -> Index:
        """Which targets of the whole text these are: (targets,) int64; all of them where this is no slice."""
        full = edges_of(self.whole, self.lanes)
        return np.concatenate(
            [np.arange(full[lane], full[lane] + self.edges[lane + 1] - self.edges[lane]) for lane in range(self.lanes)]
        )

    @property
    def order(self) -> Index:
        """All targets, in the order in which they are coded: (targets,) int64."""
        return np.concatenate([unit.windows.order for unit in self])

    def __iter__(self) -> Iterator[Unit]:
        stop, done = self.edges[:-1].copy(), 0
        for index in range(len(self)):
            windows = self.windows[self._cuts[index] : self._cuts[index + 1]]
            np.maximum.at(stop, windows.lane, windows.stop)
            done += windows.scored
            yield Unit(index, windows, self._update(index), stop.copy(), done)

    def _cut(self, block: int) -> Index:
        """Where units begin among the windows: at chunks, else at rounds."""
        if self.chunk:
            local = self.windows.first - self.edges[self.windows.lane]
            longest = int(np.diff(self.edges).max())
            begins = np.searchsorted(local, np.arange(0, longest, self._share))
        else:
            rounds = np.flatnonzero(np.append(True, self.windows.turn[1:] != self.windows.turn[:-1]))
            each = max(-(-len(rounds) // _UNITS), -(-block // self.lanes), 1)
            begins = rounds[::each]
        return np.append(begins, len(self.windows))

    def _update(self, index: int) -> Windows | None:
        """The training sequences of chunk `index`, lane after lane; None where nothing is scored after it."""
        if not self.chunk or index == len(self) - 1:
            return None
        begin, end = index * self._share, (index + 1) * self._share
        parts = []
        for low, high in zip(self.edges[:-1], self.edges[1:], strict=True):
            start = np.arange(low + begin, min(low + end, high), self.context, dtype=np.int64)
            parts.append(Windows(start, np.minimum(start + self.context, min(low + end, high)), start))
        start, stop = (np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "stop"))
        zero = np.zeros(len(start), np.int64)
        return Windows(start, stop, start, zero, zero)


def edges_of(targets: int, lanes: int) -> Index:
    """Where lanes begin, and the end: (lanes + 1,) int64."""
    each, extra = divmod(targets, lanes)
    return np.cumsum([0, *[each + (lane < extra) for lane in range(lanes)]], dtype=np.int64)


def optimizer_steps(stream: Stream, epochs: int, batch: int) -> int:
    """Optimiser steps of a chunked adaptation: `epochs` passes over each update in batches of `batch` sequences."""
    return sum(epochs * -(-len(unit.update) // batch) for unit in stream if unit.update is not None)


def _laned(spec: Any, context: int, edges: Index, whole: Index, carried: bool) -> Windows:
    """The windows of all lanes, round after round; of a slice, what lies in it."""
    sizes, kept = np.diff(whole), np.diff(edges)
    cut = {int(size): _local(spec, int(size), context) for size in np.unique(sizes)}
    columns: list[list[Index]] = [[], [], [], [], []]
    for lane, (size, most) in enumerate(zip(sizes, kept, strict=True)):
        local = cut[int(size)]
        inside = int(np.searchsorted(local.first, most))  # a slice ends in the middle of a window
        start, stop, first = local.start[:inside], np.minimum(local.stop[:inside], most), local.first[:inside]
        if carried and most > kept.min() and first[-1] < most - 1:
            # Longer lanes end with a window of one target: two shapes in a round would not share one past.
            start, first = np.append(start, most - 1), np.append(first, most - 1)
            stop = np.append(np.minimum(stop, most - 1), most)
        for column, values in zip(columns, (start, stop, first), strict=False):
            column.append(values + edges[lane])
        columns[3].append(np.full(len(first), lane, np.int64))
        columns[4].append(np.arange(len(first), dtype=np.int64))
    start, stop, first, lanes, turn = (np.concatenate(column) for column in columns)
    order = np.lexsort((lanes, turn)) if len(sizes) > 1 else slice(None)
    return Windows(start, stop, first, lanes, turn)[order]


def _local(spec: Any, targets: int, context: int) -> Windows:
    """One lane's windows, by the technique, checked: each target once, in order."""
    try:
        windows: Windows = module_of(spec).windows(targets, context, spec)
    except ValueError as error:
        raise RecipeError(f"score.windows: {error}") from error
    start, stop, first = windows.start, windows.stop, windows.first
    once = len(first) > 0 and first[0] == 0 and stop[-1] == targets and bool((first[1:] == stop[:-1]).all())
    shaped = bool(((start >= 0) & (start <= first) & (first < stop) & (stop - start <= context)).all())
    if not (once and shaped):
        raise ContractError(
            f"score/windows/{kind_of(spec)}: {targets} targets at context {context} are not each scored exactly once, "
            "in order"
        )
    return windows


def _differ(columns: tuple[Index, ...]) -> npt.NDArray[np.bool_]:
    """Where a row differs from the one before it: (n-1,) bool."""
    shape = np.stack(columns, axis=1)
    return np.asarray((shape[1:] != shape[:-1]).any(axis=1))
