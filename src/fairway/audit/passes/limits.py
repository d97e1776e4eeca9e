"""A number that lets only so many chunks, windows or documents through: seen in a trial, and tried in another one."""

from __future__ import annotations

from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.passes.reported import Reported
from fairway.audit.passes.trials import Counts, counted
from fairway.audit.trial import run
from fairway.audit.trial.limits import Forced, Site
from fairway.audit.trial.text import LENGTH, SHORT
from fairway.audit.verdict import Place

_TEXT = 62_000_000  # tokens of the validation split, at most (TECHNIQUES.md 1)
_TIMES = 0.9 * _TEXT / LENGTH  # what the whole text has more of, of whatever it is cut into
_TRIED = 2  # numbers: each costs another trial
_LESS = 0.95  # of the targets


def cut_short(case: Case, which: Reported, counts: Counts) -> tuple[str, int] | None:
    """A number that is larger than anything in the text of the trial and smaller than the whole text's, and for less
    than which targets do not count: a sentence, and its line. None where there is none."""
    whole, length = float((counts.times > 0).sum()), case.trial.length
    for site, limit, most in _limits(case):
        less = counted(run(case.script, case.settings, forced=Forced(site, limit, most // 2)), which)
        left = float((less.times > 0).sum()) if less is not None else whole
        if left < _LESS * whole:
            evidence = (
                f"Only {limit:,} are let through. Worked out for a text of {length - 1:,} targets, which has {most:,} "
                f"of them, half as many leave {1 - left / whole:.0%} of the targets out; the validation tokens are "
                f"{_TEXT / length:,.0f} times as many."
            )
            return evidence, site[0]
    return None


def stated_at(case: Case, limit: float) -> Place | None:
    """Where the trial met this number as one that others are held against: before it cuts anything."""
    lines = [site[0] for site, seen in case.trial.limits.seen.items() if seen.limit == limit]
    return case.place(lines[0]) if lines else None


def _limits(case: Case) -> Iterator[tuple[Site, int, int]]:
    """(where, the number, the most that was held against it) of the numbers that do not move with the text, held
    against what does."""
    unmet = case.trial.limits.unmet(_TIMES)
    if not unmet:
        return
    short = run(case.script, case.settings, SHORT).limits.seen  # of a number that the text sets, less is seen
    moving = [
        (site, seen.limit, seen.most)
        for site, seen in unmet.items()
        if (other := short.get(site)) is not None and other.limit == seen.limit and other.most < seen.most
    ]
    tried = {(limit, site[2]): (site, limit, most) for site, limit, most in reversed(moving) if limit is not None}
    yield from list(tried.values())[:_TRIED]


__all__ = ["cut_short", "stated_at"]
