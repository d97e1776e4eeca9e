"""What comes of a trial."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fairway.audit.trial.sums import Sum
from fairway.audit.trial.text import LENGTH

_COMMON = 32  # targets: what fewer have is no unit


@dataclass(frozen=True)
class Told:
    """A sum of losses that the script prints or writes. line: of the text in which it stands; number: in order."""

    line: int
    sum: Sum
    number: int


@dataclass(frozen=True)
class Lesson:
    """Something learns from targets of the text. stack: the lines of the calls around it and its own; again: whether
    they had been scored before; asked: where a loss of such a target was first made after it, None where none was."""

    stack: tuple[int, ...]
    again: bool
    asked: tuple[int, ...] | None = None


@dataclass
class Trial:
    """What came of it. complete: the last line of the script was reached; why: else, what stopped it.

    doubts: lines of conditions that hang on what nobody knows; steps: how many were taken; left_out: lines of
    statements that raise, and what; unsure: those among them that had scored before they did
    """

    told: list[Told] = field(default_factory=list)
    doubts: set[int] = field(default_factory=set)
    complete: bool = False
    why: str = ""
    steps: int = 0
    lessons: list[Lesson] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    unsure: set[int] = field(default_factory=set)

    def counts(self, told: Told) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each place of the text: how often its target counts in a number, where those that count least count once;
        and how much of that came after something had learned from it."""
        total, late = told.sum.counts(LENGTH)
        counted = total[total > 1e-12]
        if not counted.size:
            return total, late
        values, times = np.unique(np.round(counted / counted.max(), 6), return_counts=True)
        common = values[(times >= _COMMON) & (values > 0.01)]
        unit = (common[0] if common.size else values[times.argmax()]) * counted.max()
        return total / unit, late / unit
