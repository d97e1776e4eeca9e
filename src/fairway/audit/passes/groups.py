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
_SMALLER = 32  # times: blocks of 2,048 windows of 64 tokens are 131,072


def in_smaller_groups(case: Case, but: Collection[int] = ()) -> Trial | None:
    """The trial of the script with all sizes of groups taken for less; None where it names none. but: numbers that are
    no sizes."""
    long = case.trial
    sizes = numbers(GROUPS.pattern, case.script, case.settings.environment).difference(but)
    smaller = [
        Forced(None, size, size // _SMALLER, word)
        for size in sorted(sizes)
        if _SMALLER <= size <= long.length
        for word in _NAMED
    ]
    if not smaller:
        return None
    return run(case.script, case.settings, long.length, tuple(smaller), cut=False, native=long.native)


__all__ = ["GROUPS", "in_smaller_groups"]
