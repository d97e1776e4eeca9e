"""Two texts that differ from their middle on: does a price before the middle hang on what follows it?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fairway.audit.case import Case
from fairway.audit.passes.reported import Reported
from fairway.audit.trial.limits import Forced
from fairway.audit.verdict import Finding
from fairway.audit.weighing import stream
from fairway.audit.weighing.alternatives import LONG, PLAIN, over_text, tables, ways_of
from fairway.audit.weighing.machine import Way, Weigher


def foresees(case: Case, which: Reported) -> bool | None:
    """Whether a price hangs on what comes after its token: two texts that differ from the middle on give their first
    halves different prices, where those are summed before any of the second (RULES.md (b) 1). None where the trials
    cannot say, or the model alone says the prices."""
    few, ways = tables(case), ways_of(case, which)
    if not ways:
        return None
    tried = (_foresees(case, ways, each) for each in ((), few)[: 1 + bool(few)])
    return next((found for found in tried if found is not None), None)


def _foresees(case: Case, ways: set[Way], few: tuple[Forced, ...]) -> bool | None:
    """few: what makes tables of hashed contexts small enough for a trial. Where documents are gone through by their
    length, the later one first, the text changes within the first one alone."""
    one, spoke = over_text(case, stream.text(None), few, LONG), False
    for end in (stream.TOKENS, stream.SECOND):
        other = over_text(case, stream.otherwise(end), few, LONG) if one.trial.complete else one
        if not other.trial.complete:
            return None
        told = [_compared(one, other, way, end) for way in ways]
        if any(each is None for each in told):
            return None
        known = [each for each in told if each is not None]
        if any(each.changed for each in known):
            return True
        spoke = spoke or any(each.spoke for each in known)
        if all(each.in_order for each in known):
            break
    return False if spoke else None


class _Compared(NamedTuple):
    """Of the prices before the middle that are summed before any of what changes is. changed: whether they are others
    in the other text; spoke: whether any is not the model's own; in_order: whether these are all before the middle."""

    changed: bool
    spoke: bool
    in_order: bool


def _compared(one: Weigher, other: Weigher, way: Way, end: int) -> _Compared | None:
    """None where nobody knows them."""
    paid = [each.paid[way][1 : stream.HALF] for each in (one, other) if way in each.paid and not each.unsure(way)]
    if len(paid) < 2 or np.isnan(paid).any():
        return None
    order = one.order[way]
    before = order[1 : stream.HALF] <= order[stream.HALF : end].min()
    plain = stream.losses()[np.arange(stream.HALF - 1), stream.text(None)[1 : stream.HALF]]
    return _Compared(
        changed=not np.allclose(paid[0][before], paid[1][before], atol=PLAIN),
        spoke=not np.allclose(np.abs(paid[0]), plain, atol=PLAIN),
        in_order=bool(before.all()),
    )


def knew(case: Case) -> bool:
    """Whether what is looked up for a token may have held it, or what follows it, as far as it can be weighed."""
    return case.foresees is not False or case.itself is not None


def learned_before(case: Case) -> bool:
    """Whether it is seen that what is looked up for a token held it, or what follows it; not where nothing can be."""
    return bool(case.foresees) or case.itself is not None


def as_foreseen(case: Case, found: Finding) -> Finding:
    """A charge that an array knew too much, dropped where no price hangs on what follows, nor on its own token."""
    if found.verdict != "violates" or knew(case):
        return found
    evidence = "Where a text goes on otherwise from its middle, no price before it changes: no table foresaw it."
    return Finding(found.id, "clean", evidence, found.clause)


__all__ = ["as_foreseen", "foresees", "knew", "learned_before"]
