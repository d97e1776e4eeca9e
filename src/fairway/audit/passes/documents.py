"""Documents that are too short to be learned from may be scored by lines of their own: a trial in which some are."""

from __future__ import annotations

import weakref

from fairway.audit.case import Case
from fairway.audit.flow.events import Trace
from fairway.audit.passes.reported import Reported
from fairway.audit.passes.trials import Counts, counted
from fairway.audit.trial import Trial, run
from fairway.audit.trial.limits import Forced
from fairway.audit.trial.named import taken
from fairway.audit.trial.text import DOCUMENT, ODD

SHORTEST = ("min_len", "min_doc", "min_tokens", "min_steps", "doc_min")
"""Words in the names of how many tokens a document has at least, to be learned from."""

_LEAST = 32  # tokens: what is less leaves nothing out that has anything to be scored
_SHORT = DOCUMENT - ODD  # tokens of the shortest document of a trial's text

_SEEN: weakref.WeakKeyDictionary[Trace, Trial | None] = weakref.WeakKeyDictionary()


def least_lengths(case: Case, value: int, text: int = 0) -> tuple[Forced, ...]:
    """The numbers of tokens that a document has at least to be learned from, taken for another. text: as of `taken`."""
    return tuple(taken(case.script, case.settings, SHORTEST, range(_LEAST, _SHORT), value, text))


def with_short(case: Case, which: Reported) -> Counts | None:
    """Of the score, where one document of the text is too short for what learns from them; None where the script asks
    for no length, where the trial comes to no end, or where that document is scored by the same calls."""
    if case.trace not in _SEEN:
        forced = least_lengths(case, _SHORT + 1) if case.trial.complete else ()
        held = (*forced, *case.trial.limits.forced)
        known = case.trial.length, case.trial.native
        _SEEN[case.trace] = run(case.script, case.settings, known[0], held, False, known[1]) if forced else None
    trial = _SEEN[case.trace]
    found = counted(trial, which) if trial is not None and trial.length == case.trial.length else None
    usual = counted(case.trial, which) if found is not None else None
    if found is None or usual is None or found.said[-1].sum.ways() <= usual.said[-1].sum.ways():
        return None
    return found


__all__ = ["SHORTEST", "least_lengths", "with_short"]
