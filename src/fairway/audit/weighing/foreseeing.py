"""Two texts that differ from some token on: does a price before it hang on what follows?"""

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
    """Whether a price hangs on what comes after its token: two texts that differ from some token on give those
    before it different prices, where these are summed before any of what differs (RULES.md (b) 1). None where the
    trials cannot say, or the model alone says the prices."""
    few, ways = tables(case), ways_of(case, which)
    if not ways:
        return None
    tried = (_foresees(case, ways, each) for each in ((), few)[: 1 + bool(few)])
    return next((found for found in tried if found is not None), None)


_CHANGES = (((stream.HALF, stream.TOKENS), (stream.HALF, stream.SECOND)), ((stream.LATE, stream.TOKENS),))
"""Where the text changes, from one token up to another. Where documents are gone through by their length, the later one
first, it changes within the first one alone; where nothing but the model spoke before the middle, it changes later."""


def _foresees(case: Case, ways: set[Way], few: tuple[Forced, ...]) -> bool | None:
    """few: what makes tables of hashed contexts small enough for a trial."""
    one = over_text(case, stream.text(None), few, LONG)
    for changes in _CHANGES if one.trial.complete else ():
        spoke = False
        for since, end in changes:
            other = over_text(case, stream.otherwise(end, since), few, LONG)
            told = [_compared(one, other, way, since, end) for way in ways] if other.trial.complete else [None]
            known = [each for each in told if each is not None]
            if len(known) < len(told):
                return None
            if any(each.changed for each in known):
                return True
            spoke = spoke or any(each.spoke for each in known)
            if all(each.in_order for each in known):
                break
        if spoke:
            return False
    return None


class _Compared(NamedTuple):
    """Of the prices before a change that are summed before any of what changes is. changed: whether they are others in
    the other text; spoke: whether any is not the model's own; in_order: whether these are all before the change."""

    changed: bool
    spoke: bool
    in_order: bool


def _compared(one: Weigher, other: Weigher, way: Way, since: int, end: int) -> _Compared | None:
    """None where nobody knows them."""
    paid = [each.paid[way][1:since] for each in (one, other) if way in each.paid and not each.unsure(way)]
    if len(paid) < 2 or np.isnan(paid).any():
        return None
    order = one.order[way]
    before = order[1:since] <= order[since:end].min()
    plain = stream.losses()[np.arange(since - 1), stream.text(None)[1:since]]
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


def is_sound(case: Case) -> bool:
    """Whether it is worked out that all tokens that may stand at one place come to one, each read from the same row,
    and that no price hangs on what follows: what seems to be chosen or cut off by how well it did is so by the past."""
    weight = case.weight
    sound = weight is not None and weight.whole and not (weight.differs or weight.gate)
    return sound and case.foresees is False


def as_foreseen(case: Case, found: Finding) -> Finding:
    """A charge that an array knew too much, dropped where no price hangs on what follows, nor on its own token."""
    if found.verdict != "violates" or knew(case):
        return found
    evidence = "Where a text goes on otherwise from its middle, no price before it changes: no table foresaw it."
    return Finding(found.id, "clean", evidence, found.clause)


__all__ = ["as_foreseen", "foresees", "is_sound", "knew", "learned_before"]
