"""Vectors that are fitted to windows: which targets each window's own was fitted to, and which the others' were."""

from __future__ import annotations

import itertools
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fairway.audit.trial.sums import FITTED, LEAST, PLACE, SHARED, Sum
from fairway.audit.trial.text import LENGTH

Window = tuple[int, int]
"""Where it begins, and how far it learns (several may begin where a chunk does), or how much it is asked for."""
Places = NDArray[np.int32]
Held = NDArray[np.bool_]

MAKERS: Final = frozenset({"zeros", "zeros_like", "empty", "ones", "full", "randn", "new_zeros"})
"""What makes a vector that remembers nothing of the one before it."""
_FEW: Final = 64  # of so few tokens any order will do
_ROWS: Final = 1_500  # windows, of 41 KB each: what more of them learn is everybody's


class Fitting:
    """What vectors have learned since the last of them was made: by the place at which a window begins, and together.

    A vector has as many rows as there are windows, or fewer, and often nobody knows: a loss is marked FITTED where its
    own window's targets hold it, SHARED where any window's do; FITTED alone where any window's do and nobody can tell
    the own one. shared counts the batches of which it is known. What is learned from losses whose windows nobody can
    tell is every window's.
    """

    def __init__(self) -> None:
        self.rows: dict[Window, Held] = {}
        self.anyones, self.together = _nothing(), _nothing()
        self.listed: list[tuple[Window, Held]] = []  # of the last step, in the order in which its windows begin
        self.blank = 0  # windows of the last step whose targets were all left out
        self.empty = True
        self.made = 0  # rows of the vector, 0 where nobody knows
        self.shared = [0, 0]  # batches of windows that have a row each, and those that share fewer

    def made_anew(self, rows: int = 0) -> None:
        """A vector of nothing: it has learned nothing. rows: of it, 0 where nobody knows."""
        self.made = rows
        if not self.empty:
            self.rows.clear()
            self.listed.clear()
            self.anyones, self.together = _nothing(), _nothing()
            self.empty = True

    def learn(self, found: Sum) -> None:
        """A step on these losses. A window whose losses all weigh nought has learned nothing."""
        self.empty = False
        step: dict[Window, Held] = {}
        self.blank = 0
        for leaf in found.leaves():
            if leaf.places is None or leaf.weights is None:
                continue
            self.blank += not leaf.places.size  # one that was summed by itself
            places = _within(leaf.places)
            taught = leaf.weights != 0
            self.together[places[taught]] = True
            if leaf.rows is None or len(self.rows) > _ROWS:
                self.blank += bool(leaf.places.size) and not taught.any()
                self.anyones[places[taught]] = True
                continue
            ends = np.cumsum(leaf.rows.counts).tolist()
            for start, low, high in zip(leaf.rows.starts.tolist(), [0, *ends], ends, strict=False):
                if start == PLACE:  # a row of padding, or a window without a context
                    self.blank += 1
                    continue
                learned = places[low:high][taught[low:high]]
                window = start, int(learned.max(initial=-1))
                held = step[window] = self.rows.setdefault(window, _nothing())
                held[learned] = True
        self.listed = sorted(step.items(), key=lambda each: each[0])

    def marks(self, pos: Places, shape: tuple[int, ...], picked: NDArray[np.int64] | None = None) -> Places:
        """Of losses that are being made: their marks. shape: of the windows, where they were made flat; picked: of
        those that a mask picked, how many of each window."""
        found = np.zeros(pos.shape, dtype=np.int32)
        if self.empty:
            return found
        flat, out = pos.reshape(-1), found.reshape(-1)
        rows = runs(flat, shape[-1] if len(shape) > 1 else 0, picked)
        if not rows:
            return np.where(self.together[_within(pos)] & (pos >= 0), FITTED, 0).astype(np.int32)
        told: list[tuple[slice, Held | None]] = []
        if len(rows) == 1:
            told = self._tiled(rows[0], int(flat[rows[0].start] & PLACE))
        if not told and len(rows) < len(self.listed):
            told = self._followed(rows, flat & PLACE)
        if not told:
            asked = [(int(flat[row.start] & PLACE), row.stop - row.start) for row in rows]
            told = list(zip(rows, self._owned(asked), strict=True))
        if len(told) > 1 and self.made:
            self.shared[self.made < len(told)] += 1  # a last batch may have fewer windows than rows
        for row, own in told:
            places = _within(flat[row])
            shared = self.together[places]
            if own is None:
                out[row] = FITTED * shared
            else:
                out[row] = FITTED * (own[places] | self.anyones[places]) + SHARED * shared
        return found

    def _tiled(self, run: slice, begin: int) -> list[tuple[slice, Held | None]]:
        """What each of the windows that learned last is asked for, where it follows on without a gap: as much as each
        has learned further than the one before it, and the first one the rest. Empty where they do not move on evenly,
        or what is asked for does not begin about where they have learned to. begin: the first place."""
        learned = [held for _, held in self.listed]
        found = [self._laid(run, begin, lead, learned) for lead in ([_nothing()], [])]
        if not self.blank:  # of windows that are laid end to end nobody sees one without a context
            found.sort(key=lambda told: not told or self._outgrows(told))
        return next((told for told in found if told), [])

    @staticmethod
    def _outgrows(told: list[tuple[slice, Held | None]]) -> bool:
        """Whether the first window is asked for more than the second."""
        first, second = (window.stop - window.start for window, _ in told[:2])
        return first > second

    @staticmethod
    def _laid(run: slice, begin: int, lead: list[Held], learned: list[Held]) -> list[tuple[slice, Held | None]]:
        """lead: a window without a context is the first."""
        ends = [int(held.nonzero()[0].max()) if held.any() else -1 for held in learned]
        after = ends if lead else ends[1:]
        steps = set(np.diff(after).tolist())
        step = steps.pop() if len(steps) == 1 else 0
        if step < 1 or -1 in after:
            return []
        firsts = (run.stop - step * len(after), run.start + step)  # the first has the rest, or the last has less
        first = min(firsts, key=lambda each: abs(begin + each - run.start - after[0] - 1))
        if first <= run.start or abs(begin + first - run.start - after[0] - 1) >= step:
            return []
        bounds = [run.start, *range(first, first + step * len(after), step), run.stop]
        if bounds[-2] >= run.stop:
            return []
        return list(zip(itertools.starmap(slice, itertools.pairwise(bounds)), [*lead, *learned], strict=True))

    def _followed(self, rows: list[slice], places: Places) -> list[tuple[slice, Held | None]]:
        """What each of the windows that learned last is asked for, where it is what follows on all that it has learned:
        a window ends where another one's begins. Empty where there is one that is asked for nothing of that kind, or
        more that nobody owns than there are windows without a context."""
        after = {int(held.nonzero()[0].max()) + 1: held for _, held in self.listed if held.any()}
        told: list[tuple[slice, Held | None]] = []
        begun: set[int] = set()
        for row in rows:
            first, last = int(places[row.start]), int(places[row.stop - 1])
            starts = sorted({first, *(place for place in after if first < place <= last)})
            bounds = [*(row.start + place - first for place in starts), row.stop]
            told += [
                (slice(low, high), after.get(place, _nothing()))
                for place, low, high in zip(starts, bounds, bounds[1:], strict=False)
            ]
            begun.update(starts)
        blank = self.blank + sum(not held.any() for _, held in self.listed)
        return told if after and after.keys() <= begun and len(begun - after.keys()) <= blank else []

    def _owned(self, asked: list[Window]) -> list[Held | None]:
        """What the windows have learned that are asked for so many targets from a place on, each: there are as many as
        learned last, and other parts of them are scored, or they are told by where they begin, where all that they have
        learned is among what they are asked for. None for those that nobody can tell."""
        starts = [start for start, _ in asked]
        order = sorted(range(len(starts)), key=starts.__getitem__)
        more = len(starts) - len(self.listed)
        first: list[tuple[Window, Held]] = [((0, -1), _nothing())] * more if 0 < more <= self.blank else []
        listed = [*first, *self.listed]  # those without a context are the first ones of the text
        in_order = len(starts) == len(listed) and all(
            window[0] <= starts[n] and (not held.any() or starts[n] <= _next(held))
            for n, (window, held) in zip(order, listed, strict=True)
        )
        if in_order:
            placed = {n: held for n, (_, held) in zip(order, listed, strict=True)}
            return [placed[n] for n in range(len(starts))]
        known = [
            [held for (begin, reach), held in self.rows.items() if begin == start and reach < start + many]
            for start, many in asked
        ]
        return [np.logical_or.reduce(each) if each else None for each in known]


def _nothing() -> Held:
    return np.zeros(LENGTH + 1, dtype=np.bool_)


def _next(held: Held) -> int:
    """The place that would be learned next: after every eighth one the eighth behind the last."""
    last = held.nonzero()[0][-2:].tolist()
    return int(2 * last[-1] - last[0]) if len(last) == 2 else int(last[0]) + 1


def _within(places: Places) -> Places:
    """Places without their marks; of padding the one behind the text."""
    return np.minimum(places & PLACE, LENGTH)


def runs(places: Places, width: int = 0, picked: NDArray[np.int64] | None = None) -> list[slice]:
    """Where the places of a text go on one by one: its windows, one after the other. width: tokens of a window where
    that is known, since one may begin where another ends; picked: of each, where a mask picked them. None where they
    stand in another order."""
    bare = np.where(places >= 0, places & PLACE, -2)
    padding = (bare[1:] < 0) & (bare[:-1] < 0)
    ends = np.flatnonzero((np.diff(bare) != 1) & ~padding) + 1
    if ends.size * LEAST > places.size + _FEW:
        return []
    if width >= LEAST and not places.size % width:
        ends = np.union1d(ends, np.arange(width, places.size, width))
    if picked is not None and int(picked.sum()) == places.size:
        ends = np.setdiff1d(np.union1d(ends, np.cumsum(picked)), [0, places.size])
    bounds = [0, *ends.tolist(), places.size]
    return [slice(low, high) for low, high in itertools.pairwise(bounds) if high > low and bare[low] >= 0]
