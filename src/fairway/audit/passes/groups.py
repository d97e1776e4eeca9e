"""A trial with smaller chunks: of chunks and blocks of windows the short text has one or two, and what is done with
every fourth of them, or with no more than so many, does not show."""

import re
from collections.abc import Collection

from fairway.audit.case import Case
from fairway.audit.trial import Trial, run
from fairway.audit.trial.limits import Forced
from fairway.audit.trial.named import numbers

_NAMED = ("chunk", "block", "segment", "region", "group")
GROUPS = re.compile("|".join(_NAMED), re.IGNORECASE)
SIZES = (32, 8)  # times smaller: blocks of 2,048 windows of 64 tokens are 131,072; a chunk may have to hold a window


def in_smaller_groups(case: Case, but: Collection[int] = (), smaller: int = SIZES[0]) -> Trial | None:
    """The trial of the script with all sizes of groups taken for less; None where it names none. but: numbers that are
    no sizes; smaller: how many times."""
    long = case.trial
    sizes = numbers(GROUPS.pattern, case.script, case.settings.environment).difference(but)
    fewer = [
        Forced(None, size, size // smaller, word)
        for size in sorted(sizes)
        if smaller <= size <= long.length
        for word in _NAMED
    ]
    if not fewer:
        return None
    return run(case.script, case.settings, long.length, tuple(fewer), cut=False, native=long.native)


__all__ = ["GROUPS", "in_smaller_groups"]
