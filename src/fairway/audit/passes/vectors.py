"""What a trial shows of vectors that are fitted to windows: whether what is scored with one had taught it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fairway.audit.case import Case
from fairway.audit.flow.events import Update
from fairway.audit.passes.reported import Reported
from fairway.audit.passes.trials import FEW, counted_once, counts_of, parting
from fairway.audit.trial.sums import FITTED, SHARED
from fairway.audit.trial.told import together

_NEAR = 2  # calls that both have in common, at least
_LAST = 256  # targets: of the last window
_FIRST = 4_096  # tokens: the longest window
_MOST = 0.5  # of the targets


def fitted(case: Case, which: Reported, step: Update, shared: bool) -> Literal["apart", "met", ""]:
    """What a trial shows of vectors that are fitted to windows: "apart" where no loss that counts is of a target to
    which the vector of its own window was fitted (shared: that of any window), "met" where most are, and each is summed
    once. "" if neither."""
    counts = counts_of(case, which)
    calls = tuple(place.line for place in step.stack[:-1])
    if counts is None or not counts.trial.fitted:
        return ""
    trial, told = counts.trial, counts.said[-1].sum
    while calls[_NEAR:] and calls not in trial.taught_in and calls not in trial.untold:
        calls = calls[:-1]  # the step stands in a helper, the gradients were asked for around it
    if calls not in trial.taught_in or calls in trial.untold:
        return ""
    mark = SHARED | FITTED if shared else FITTED
    share = told.share(mark)
    met = told.marked(mark) < trial.length - _LAST  # copies that fill up the last batch learn from all of a window
    if not met.any():
        return "apart"
    return "met" if share > _MOST and calls not in trial.blurred and counted_once(case, which) is not None else ""


def fitted_to_scored(case: Case, which: Reported) -> tuple[str, str, int] | None:
    """What a trial alone shows of vectors that are fitted to windows: that targets count of which the vector of their
    own window had learned, or most had been learned by one vector of several windows. The rule, a sentence, a line."""
    counts = counted_once(case, which)
    if counts is None or not counts.trial.fitted or counts.trial.blurred:
        return None
    trial, told = counts.trial, counts.said[-1].sum
    many = int((counts.times > 0).sum())
    places = np.intersect1d(told.marked(FITTED), told.marked(SHARED))  # where nobody can tell the window, FITTED alone
    # The first window, which is scored whole, may have a switch.
    own = int(((places >= _FIRST) & (places < trial.length - _LAST)).sum())
    shared = round(told.share(SHARED) * many)
    worked = f"Worked out for a text of {trial.length - 1:,} targets"
    if own >= FEW:
        ways = [(lesson.stack, way) for lesson in trial.lessons for way in lesson.asked]
        apart = [pair for pair in ways if pair[0][:-1] != pair[1][: len(pair[0]) - 1]]
        line = parting(*max(apart, key=lambda pair: together(*pair))) if apart else trial.vectors.line
        return "slot-on-scored", f"{worked}, {own:,} of them are scored with a vector that was fitted to them.", line
    if shared > _MOST * many and trial.vectors.shared > trial.vectors.own:
        evidence = (
            f"{worked}, {shared:,} of them are scored with a vector that was fitted to them in the context of another "
            "window of the batch."
        )
        return "slot-shared-delta", evidence, trial.vectors.line
    return None


__all__ = ["fitted", "fitted_to_scored"]
