"""One run for each token that may stand at the end, and what the script's probabilities of them add up to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from fairway.audit.case import Case
from fairway.audit.passes.reported import Reported
from fairway.audit.passes.trials import counts_of
from fairway.audit.trial import text
from fairway.audit.trial.arrays import largest
from fairway.audit.trial.limits import Forced
from fairway.audit.trial.machine import over
from fairway.audit.trial.vocabulary import size_in
from fairway.audit.weighing import stream
from fairway.audit.weighing.machine import Way, Weigher
from fairway.audit.weighing.stream import PIECES

_NUMBERS = 60_000_000  # elements of a table of hashed counts
_PLAIN = 1e-4
_MORE = 1.005  # what is more is no rounding


@dataclass(frozen=True)
class Weight:
    """total: what the probabilities add up to; line: where a row, or the price, is made that is to blame."""

    total: float
    line: int


def weighed(case: Case, which: Reported) -> Weight | None:
    """The most that the probabilities of the last token add up to in the score; None where the trial cannot say, or
    where the model alone says them."""
    counts = counts_of(case, which, doubtful=True)
    if counts is None:
        return None
    ways = counts.said[-1].sum.ways()
    said: list[dict[Way, float]] = []
    line = models = 0
    tried = stream.alternatives()
    for last, _ in tried:
        run = _run(case, last)
        here = {way: price for way, price in run.said.items() if way in ways and not run.unsure(way)}
        if not run.trial.complete or not here:
            return None
        said.append(here)
        line = line or _to_blame(run)
        plain = stream.losses()[stream.TOKENS - 2, last]
        if all(abs(price - plain) < _PLAIN for price in said[-1].values()):
            models += 1
            if models == len(said) == 2:
                return None
    shared = set.intersection(*(set(each) for each in said))
    totals = {
        way: sum(many * math.exp(-each[way]) for each, (_, many) in zip(said, tried, strict=True)) for way in shared
    }
    total = max(totals.values(), default=0.0)
    return Weight(total, line) if total > 0.0 else None


def _to_blame(run: Weigher) -> int:
    """The first line, of those that follow each other again and again, whose rows sum to more than one; else the last
    that makes a price."""
    found: list[int] = []
    for line in reversed(run.rows):
        if line in found and line != found[-1]:
            break
        found.append(line)
    return found[-1] if found else run.mixed


def is_too_much(weight: Weight) -> bool:
    return weight.total > _MORE


def _run(case: Case, last: int) -> Weigher:
    given, room = text.given.set(stream.text(last)), largest.set(_NUMBERS)
    size = size_in(case.script.text)
    forced = (Forced(None, size, PIECES, "vocab"),)
    try:
        return over(partial(Weigher, case.script, case.settings), stream.TOKENS, forced)
    finally:
        text.given.reset(given)
        largest.reset(room)


__all__ = ["Weight", "is_too_much", "weighed"]
