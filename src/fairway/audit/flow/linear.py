"""How far apart two places lie, by the texts that say how they were computed: `sub(add(ws,2048),ws)` is 2048."""

from __future__ import annotations

import re
from collections import Counter

_PARTS = re.compile(r"(\w+)\((.*)\)", re.S)


def difference(one: str, other: str) -> int | None:
    """one - other, where it is a number whatever the variables are; None where it is not, or nothing tells."""
    left, right = _form(one), _form(other)
    if left is None or right is None:
        return None
    left.subtract(right)
    number = left.pop("", 0)
    return None if any(left.values()) else number


def _form(sym: str) -> Counter[str] | None:
    """Name -> how often it is added; "": the number. What starts a first window apart (`0 if ws == 0 else x`) is x."""
    sym = sym.removeprefix("~")
    if not sym or sym.count("(") != sym.count(")"):
        return None
    if re.fullmatch(r"-?\d+", sym):
        return Counter({"": int(sym)})
    match = _PARTS.fullmatch(sym)
    if match is None or match[1] not in ("add", "sub", "mult", "or"):
        return Counter({sym: 1})
    parts = _split(match[2])
    if len(parts) != 2:
        return None
    if match[1] == "or":
        return _form(parts[1]) if parts[0] in ("", "0") else _form(parts[0]) if parts[1] in ("", "0") else None
    left, right = _form(parts[0]), _form(parts[1])
    if left is None or right is None:
        return None
    if match[1] == "mult":
        return _times(left, right)
    left.update(right) if match[1] == "add" else left.subtract(right)
    return left


def _times(left: Counter[str], right: Counter[str]) -> Counter[str] | None:
    for number, other in ((left, right), (right, left)):
        if not any(count for name, count in number.items() if name):
            return Counter({name: count * number[""] for name, count in other.items()})
    return None


def _split(text: str) -> list[str]:
    """The arguments of a call, at commas outside of all brackets."""
    found, deep, start = [], 0, 0
    for n, sign in enumerate(text):
        deep += (sign in "([{") - (sign in ")]}")
        if sign == "," and not deep:
            found.append(text[start:n])
            start = n + 1
    return [*found, text[start:]]


__all__ = ["difference"]
