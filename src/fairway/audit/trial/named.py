"""The numbers that names of a kind are given: `TTT_CHUNK_TOKENS=32768`, `("CHUNK_TOKENS", 32_768)`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from fairway.audit.reading.script import Script
from fairway.audit.settings import Settings
from fairway.audit.trial.limits import Forced

LARGEST = 1 << 30


def numbers(words: str, text: str, environment: Mapping[str, object]) -> set[int]:
    """words: a pattern of what stands in the names, `chunk|segment`; environment: what a script is given from outside
    it."""
    found = {int(match[1].replace("_", "")) for match in _given(words).finditer(text)}
    told = (value for name, value in environment.items() if re.search(words, name, re.IGNORECASE))
    return found | {int(value) for value in told if isinstance(value, str) and value.isdecimal()}


def taken(script: Script, settings: Settings, words: tuple[str, ...], size: range, value: int) -> Iterator[Forced]:
    """Numbers of such a size that a name with one of the words is given, taken for another wherever one stands in a
    name: `rows = int(os.environ.get("TABLE_SIZE", 65_536))`."""
    found = numbers("|".join(words).replace("_", "[-_]"), script.text, settings.environment)
    for number in sorted(found):
        if number in size:
            yield from (Forced(None, number, value, word) for word in words)


@cache
def _given(words: str) -> re.Pattern[str]:
    option = r"(?:type\s*=\s*int\s*,\s*)?"
    named, number = r"""(?:["']\s*,|["']?\s*[:=])""", r"""(?:\w+\s*=\s*)?(?:int\()?["']?(\d[\d_]{0,9})\b"""
    return re.compile(rf"(?:{words})[\w-]*{named}\s*{option}{number}", re.IGNORECASE)


__all__ = ["LARGEST", "numbers", "taken"]
