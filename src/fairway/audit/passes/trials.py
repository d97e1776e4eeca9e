"""What a trial over a short text shows of the score: how often each target counts, and what was learned before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fairway.audit.case import Case
from fairway.audit.passes.reported import Reported
from fairway.audit.trial.text import LENGTH, UNIT
from fairway.audit.trial.told import Lesson, Told, Trial
from fairway.audit.verdict import Place

_ENDS = 2 * UNIT  # tokens at the end of the text: what windows make of them is a rule of its own
_MOST_OF = 0.55  # of the text: where the score ends after less, more than a last chunk is missing
_TWICE = 1.4  # times: what is less is a weight, as that of a window that is shorter than others
_CONTEXT = 0.2  # of what is left out: the share that stands in the windows of what is scored
_FEW = 32  # targets: fewer that count otherwise are edges of documents


@dataclass(frozen=True)
class Counts:
    """Of the score: how often each target of the text counts, and how much of that came after a lesson."""

    times: NDArray[np.float64]
    late: NDArray[np.float64]
    trial: Trial
    said: tuple[Told, ...] = ()

    @property
    def more(self) -> NDArray[np.int64]:
        """The targets before the end of the text that count more than once."""
        found: NDArray[np.int64] = np.flatnonzero(self.times[: LENGTH - _ENDS] > _TWICE)
        return found

    @property
    def missing(self) -> NDArray[np.int64]:
        """The targets that do not count; the first token is no target. What a last chunk that is not full leaves out at
        the end is little of a real text, whatever it is of this one."""
        counted = np.flatnonzero(self.times > 0.01)
        last = int(counted[-1]) + 1 if counted.size and counted[-1] > LENGTH * _MOST_OF else LENGTH
        found: NDArray[np.int64] = np.flatnonzero(self.times[1:last] < 0.01) + 1
        return found

    @property
    def lessons(self) -> list[Lesson]:
        """Those whose targets were scored, or scored again, after them."""
        return [lesson for lesson in self.trial.lessons if lesson.asked is not None]


def counts_of(case: Case, which: Reported) -> Counts | None:
    """None where the trial came to no end, or the number that is reported is not among those that it told."""
    trial = case.trial
    if not trial.complete or trial.unsure or not trial.told:
        return None
    ways = [tuple(place.line for place in said.stack) for said in which.score]
    named = [told for told in trial.told if any(_same_way(told.stack, way) for way in ways)]
    if not named and which.others:
        return None
    said = tuple(named or trial.told[-4:])
    told: Told = said[-1]
    times, late = trial.counts(told)
    if not (times > 0).any():
        return None
    return Counts(times, late, trial, said)


def _same_way(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one is the beginning of the other: a helper that prints knows one call more than who formats."""
    shared = min(len(one), len(other))
    return shared > 0 and one[:shared] == other[:shared]


def repeated(counts: Counts) -> str:
    """How many targets count more than once, as a sentence; "" where so few do that it is an edge."""
    more = counts.more
    if len(more) < _FEW:
        return ""
    most = counts.times[more].max()
    return (
        f"Worked out for a text of {LENGTH - 1:,} targets, {len(more):,} of them count more than once in the score (up "
        f"to {most:.3g} times), the first of them at place {more[0]:,}."
    )


def unscored(counts: Counts) -> str:
    """How many targets do not count at all, as a sentence; "" where so few do that it is an edge."""
    missing = counts.missing
    if len(missing) < max(_FEW, (LENGTH - _ENDS) // 200):
        return ""
    if not counts.trial.lost:
        return _without(missing)
    asked = next((told.asked for told in reversed(counts.said) if told.asked is not None), None)
    if asked is None or asked[missing].mean() > _CONTEXT:
        return ""  # it was asked of them, and what came of it may be among what got lost
    return _without(missing)


def _without(missing: NDArray[np.int64]) -> str:
    return (
        f"Worked out for a text of {LENGTH - 1:,} targets, {len(missing):,} of them do not count in the score, the "
        f"first of them at place {missing[0]:,}."
    )


def lesson_before(counts: Counts, again: bool) -> tuple[str, Place] | None:
    """Targets of the score from which something learned before: a sentence, and where the order is decided."""
    if counts.trial.fitted:
        return None  # what is fitted to one window is nothing to another, and the trial does not tell them apart
    after = np.flatnonzero(counts.late > 0)
    lessons = [lesson for lesson in counts.lessons if lesson.again is again]
    if len(after) < _FEW or not lessons or len(lessons) * 2 < len(counts.lessons):
        return None
    lesson = lessons[0]
    assert lesson.asked is not None
    line = parting(lesson.stack, lesson.asked)
    how = "had been scored, were learned from and are scored again" if again else "were learned from before that"
    evidence = (
        f"Worked out for a text of {LENGTH - 1:,} targets, {len(after):,} of those that the score counts {how}: the "
        f"step at line {lesson.stack[-1]} comes before the loss at line {lesson.asked[-1]}."
    )
    return evidence, Place("", line)


def parting(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The line of `one` in the function in which the two ways part."""
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return mine
    return one[-1]
