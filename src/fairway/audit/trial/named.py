"""The numbers that names of a kind are given: `TTT_CHUNK_TOKENS=32768`, `("CHUNK_TOKENS", 32_768)`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache


def numbers(words: str, text: str, environment: Mapping[str, object]) -> set[int]:
    """words: a pattern of what stands in the names, `chunk|segment`; environment: what a script is given from outside
    it."""
    found = {int(match[1].replace("_", "")) for match in _given(words).finditer(text)}
    told = (value for name, value in environment.items() if re.search(words, name, re.IGNORECASE))
    return found | {int(value) for value in told if isinstance(value, str) and value.isdecimal()}


@cache
def _given(words: str) -> re.Pattern[str]:
    option = r"(?:type\s*=\s*int\s*,\s*)?"
    named, number = r"""(?:["']\s*,|["']?\s*[:=])""", r"""(?:\w+\s*=\s*)?(?:int\()?["']?(\d[\d_]{0,9})\b"""
    return re.compile(rf"(?:{words})[\w-]*{named}\s*{option}{number}", re.IGNORECASE)


__all__ = ["numbers"]
