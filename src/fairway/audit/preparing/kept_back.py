"""How many documents a preparation keeps out of the text that is trained on: a trial with one of ours for 5,000."""

from __future__ import annotations

import re

from fairway.audit.preparing.asking import Asked
from fairway.audit.preparing.documents import BY_CODE
from fairway.audit.preparing.judging import Wrong, cuts_of
from fairway.audit.preparing.machine import prepared
from fairway.audit.reading.script import Script
from fairway.audit.records.splits import FEWEST, numbers_in
from fairway.audit.trial.limits import Forced

SCORED = 50_000  # documents of the challenge's validation split
_SCALE = 5_000  # of them for one of ours
_MOST_OF_THEM = 0.8
_TRAINING = re.compile(r"train", re.IGNORECASE)


def kept_back(asked: Asked) -> Wrong | None:
    """A preparation that makes training text of documents that are scored: it passes over the first ones of all, and
    over fewer than the split has. None where it passes over none, or where what it reads is called training text: its
    documents are none of the split's."""
    lines = _numbers(asked.script)
    if not any(number < SCORED for number in lines):
        return None
    forced = tuple(Forced(None, number, max(number // _SCALE, 1)) for number in lines)
    first = list(BY_CODE)
    machine = prepared(asked, forced)
    cuts = [] if any(_TRAINING.search(name) for name in machine.disk.asked) else cuts_of(machine)
    for cut in cuts:
        if not _TRAINING.search(cut.path.rpartition("/")[2]):
            continue
        places = sorted(first.index(code) for code, _ in cut.documents)
        passed = places[0]
        rest = len(first) - passed
        if 0 < passed < SCORED // _SCALE and len(places) > _MOST_OF_THEM * rest:
            count, line = _said(lines, passed)
            written = f" ({count:,} in the script)" if count else ""
            evidence = (
                f"Tried with one document of our own for {_SCALE:,}, this preparation passes over {passed} of the "
                f"{SCORED // _SCALE} that are scored{written}, and makes training text of the others."
            )
            return Wrong("overlap-default", evidence, line)
    return None


def _numbers(script: Script) -> dict[int, int]:
    """Round numbers that may count documents, and the last line of each."""
    return {each.value: each.lineno for each in numbers_in(script.tree) if each.value % FEWEST == 0}  # type: ignore[operator, misc]


def _said(lines: dict[int, int], passed: int) -> tuple[int, int]:
    """The number that was taken for as many documents as were passed over, and its line; 0, and the last line of any,
    where none was."""
    of_them = [each for each in lines if max(each // _SCALE, 1) == passed]
    return (of_them[0], lines[of_them[0]]) if len(of_them) == 1 else (0, max(lines.values()))


__all__ = ["SCORED", "kept_back"]
