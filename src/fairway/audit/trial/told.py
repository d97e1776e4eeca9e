"""What comes of a trial."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fairway.audit.trial.limits import Limits
from fairway.audit.trial.planning import Plans
from fairway.audit.trial.sums import PLACE, Sum
from fairway.audit.trial.text import LENGTH

_COMMON = 0.01  # of the targets that count: what fewer have is no unit
_CALLS = 2_000  # ways that are kept
_SOME = 16  # targets: what so many have is one, where the others have a whole number of it


@dataclass(frozen=True)
class Told:
    """A sum of losses that the script prints or writes.

    stack: the lines of the calls around it, outermost first, and of its own statement; number: in order
    """

    stack: tuple[int, ...]
    sum: Sum
    number: int


@dataclass(frozen=True)
class Lesson:
    """Something learns from targets of the text. stack: the lines of the calls around it and its own; many: how many
    it learns from for the first time; early: how many of these had not been scored before; asked: where losses of
    such targets were made after it, each line once; cut: the line of its function that cuts what it learns from out of
    the text, 0 where another one does."""

    stack: tuple[int, ...]
    many: int
    early: int
    asked: tuple[tuple[int, ...], ...] = ()
    cut: int = 0


class Picked(NamedTuple):
    """The least of several sums of losses. line: where; kept: the sums that it holds; compared: all of them."""

    line: int
    kept: tuple[Sum, ...]
    compared: tuple[Sum, ...]


class Vectors(NamedTuple):
    """Of those that are fitted to windows: batches whose windows have a row each, batches whose windows share fewer
    rows; and the line that made the last one."""

    own: int = 0
    shared: int = 0
    line: int = 0


def together(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many calls two ways begin with together."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclass
class Trial:
    """What came of it. complete: the last line of the script was reached; why: else, what stopped it.

    length: tokens of the text; doubts: lines of conditions that hang on what nobody knows; steps: how many were taken;
    slow: where a loop over tokens one by one was too long for the text, the steps of its turns; left_out: lines of
    statements that raise, and what; unsure: those among them that had scored before they did; summed: lines that sum
    losses; booked: by the calls and the line that sum them, how often each target was, and again: how many of them were
    when the first was summed again; early: places that were learned
    from before they were scored; taught_in: the calls around lessons, and the mark that each leaves at its targets;
    asked_in: the calls around losses; untold: the calls around lessons from what the trial does not know; blurred:
    those around losses that are weighed by it; limits: numbers that others were held against; plans: lines that put
    windows together; fitted: whether vectors of their own are fitted to windows, and vectors: those; table: the line
    that writes the length of a piece into a table; native: whether kernels that numba compiles were worked out;
    bent: lines that work out a function of one target's loss, exp(-loss / bytes), whose price no sum of losses shows;
    picked: what was chosen as the least of several sums; reach: by the calls around them, the last token of the parts
    that are taken out of the text
    """

    vocabulary: int = 1_024
    length: int = LENGTH
    told: list[Told] = field(default_factory=list)
    doubts: set[int] = field(default_factory=set)
    complete: bool = False
    why: str = ""
    steps: int = 0
    slow: float = 0.0
    lessons: list[Lesson] = field(default_factory=list)
    early: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(LENGTH, dtype=bool))
    fitted: bool = False
    native: bool = True
    vectors: Vectors = field(default_factory=Vectors)
    table: int = 0
    taught_in: dict[tuple[int, ...], int] = field(default_factory=dict)
    asked_in: set[tuple[int, ...]] = field(default_factory=set)
    untold: set[tuple[int, ...]] = field(default_factory=set)
    blurred: set[tuple[int, ...]] = field(default_factory=set)
    left_out: dict[int, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    plans: Plans = field(default_factory=Plans)
    unsure: set[int] = field(default_factory=set)
    summed: set[int] = field(default_factory=set)
    booked: dict[tuple[int, ...], NDArray[np.int32]] = field(default_factory=dict)
    again: dict[tuple[int, ...], int] = field(default_factory=dict)
    bent: set[int] = field(default_factory=set)
    picked: list[Picked] = field(default_factory=list)
    reach: dict[tuple[int, ...], int] = field(default_factory=dict)

    def reached(self, calls: tuple[int, ...], places: NDArray[np.int32]) -> None:
        """These calls take a part of the text."""
        if places.size and (calls in self.reach or len(self.reach) < _CALLS):
            self.reach[calls] = max(self.reach.get(calls, 0), int(places.max()) & PLACE)

    def counts(self, told: Told) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each place of the text: how often its target counts in a number, where those that count least count once;
        and how much of that came after something had learned from it."""
        total, late = told.sum.counts(self.length)
        unit = self.unit(total)
        return (total / unit, late / unit) if unit else (total, late)

    def unit(self, total: NDArray[np.float64]) -> float:
        """What a target that counts once weighs in a number; 0 where none counts."""
        counted = total[total > 1e-15]
        if not counted.size:
            return 0.0
        values, times = np.unique(np.round(counted / counted.max(), 6), return_counts=True)
        common = np.flatnonzero((times >= _COMMON * counted.size) & (values > 0.01))
        level = values[common[0] if common.size else times.argmax()]
        fewer = values[(values < level) & (times >= _SOME)]
        parts = level / fewer
        whole = fewer[np.abs(parts - np.round(parts)) < 1e-5]  # all but the first window count twice
        level = whole[0] if whole.size else level
        near = counted[np.abs(counted / counted.max() - level) < 1e-5]
        return float(np.median(near))
