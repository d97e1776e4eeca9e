"""Two texts that differ from their middle on: does a price before the middle hang on what follows it?"""

from __future__ import annotations

import numpy as np

from fairway.audit.case import Case
from fairway.audit.passes.reported import Reported
from fairway.audit.trial.limits import Forced
from fairway.audit.verdict import Finding
from fairway.audit.weighing import stream
from fairway.audit.weighing.alternatives import LONG, PLAIN, over_text, tables, ways_of
from fairway.audit.weighing.machine import Way


def foresees(case: Case, which: Reported) -> bool | None:
    """Whether a price hangs on what comes after its token: two texts that differ from the middle on give their first
    halves different prices (RULES.md (b) 1). None where the trials cannot say, or the model alone says the prices."""
    few, ways = tables(case), ways_of(case, which)
    if not ways:
        return None
    tried = (_foresees(case, ways, each) for each in ((), few)[: 1 + bool(few)])
    return next((found for found in tried if found is not None), None)


def _foresees(case: Case, ways: set[Way], few: tuple[Forced, ...]) -> bool | None:
    """few: what makes tables of hashed contexts small enough for a trial."""
    runs = []
    for ids in (stream.text(None), stream.otherwise()):
        runs.append(over_text(case, ids, few, LONG))
        if not runs[-1].trial.complete:
            return None
    plain = stream.losses()[np.arange(stream.HALF - 1), stream.text(None)[1 : stream.HALF]]
    spoke = False
    for way in ways:
        paid = [each.paid[way][1 : stream.HALF] for each in runs if way in each.paid and not each.unsure(way)]
        if len(paid) < len(runs) or np.isnan(paid).any():
            return None
        if not np.allclose(paid[0], paid[1], atol=PLAIN):
            return True
        spoke = spoke or not np.allclose(np.abs(paid[0]), plain, atol=PLAIN)
    return False if spoke else None


def knew(case: Case) -> bool:
    """Whether what is looked up for a token may have held it, or what follows it, as far as it can be weighed."""
    return case.foresees is not False or case.itself is not None


def as_foreseen(case: Case, found: Finding) -> Finding:
    """A charge that an array knew too much, dropped where no price hangs on what follows, nor on its own token."""
    if found.verdict != "violates" or knew(case):
        return found
    evidence = "Where a text goes on otherwise from its middle, no price before it changes: no table foresaw it."
    return Finding(found.id, "clean", evidence, found.clause)


__all__ = ["as_foreseen", "foresees", "knew"]
