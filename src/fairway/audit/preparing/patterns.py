"""Patterns of a script, held against texts of our own: only such as come to an end."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fairway.audit.trial.values import UNKNOWN, Raised, Unknown, Value

_LONG = 5_000  # characters of a pattern
_TEXT = 20_000  # characters of a text: all documents of ours are 3,000
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:[:=!#>]|<[=!]|P?<\w+>|P=\w+)|\(|\)|[*+?|]|\{\d*,?\d*\}|.", re.DOTALL
)


def grows(pattern: str) -> bool:
    """Whether what can be read in several ways is repeated, `(a+)*`, `(a|a)*`, `(a?){60}`: such a pattern may take for
    ever. Of two repetitions side by side, `a*a*b`, the time grows as a power of the text's length only."""
    groups = [False]  # whether each can be read in several ways
    closed = False  # whether the last thing was such a group
    for token in _TOKEN.findall(pattern):
        repeats = token in ("*", "+") or (token[0] == "{" and len(token) > 2)
        if repeats and closed:
            return True
        closed = False
        if token[0] == "(":
            groups.append(False)
        elif token == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] |= closed
        elif repeats or token in ("?", "|"):
            groups[-1] = True
    return False


def _compiled(pattern: Value, flags: Value = 0) -> Any:
    if isinstance(pattern, Pattern):
        return pattern.held
    if not isinstance(pattern, (str, bytes)) or len(pattern) > _LONG or not isinstance(flags, int):
        raise TypeError
    try:
        if grows(pattern if isinstance(pattern, str) else pattern.decode("latin-1")):
            raise TypeError
        return re.compile(pattern, flags)
    except re.error:
        raise TypeError from None


class Pattern:
    """re.compile."""

    def __init__(self, machine: Any, pattern: Value, flags: Value = 0) -> None:
        self.machine = machine
        self.held = _compiled(pattern, flags)

    def sub(self, put: Value, text: Value, count: Value = 0, **_: Value) -> Value:
        return self.subn(put, text, count)[0]

    def subn(self, put: Value, text: Value, count: Value = 0, **_: Value) -> Value:
        if not isinstance(text, (str, bytes)) or len(text) > _TEXT:
            return UNKNOWN, UNKNOWN

        def put_in(found: Any) -> Any:
            made = self.machine.call(put, (Match(found),), {}, self.machine.line)
            if isinstance(made, Unknown):
                raise TypeError
            return made

        try:
            made = self.held.subn(put if isinstance(put, (str, bytes)) else put_in, text, count)
        except re.error as error:  # of what is put in
            raise Raised("error", str(error)) from None
        self.machine.changed(text, made[0])
        return made

    def match(self, text: Value, *_: Value) -> Value:
        return self._found(self.held.match, text)

    def search(self, text: Value, *_: Value) -> Value:
        return self._found(self.held.search, text)

    def fullmatch(self, text: Value, *_: Value) -> Value:
        return self._found(self.held.fullmatch, text)

    def _found(self, act: Callable[..., Any], text: Value) -> Value:
        if not isinstance(text, (str, bytes)) or len(text) > _TEXT:
            return UNKNOWN
        found = act(text)
        return None if found is None else Match(found)

    def findall(self, text: Value, *_: Value) -> Value:
        return self.held.findall(text) if isinstance(text, (str, bytes)) and len(text) <= _TEXT else UNKNOWN

    def split(self, text: Value, *_: Value) -> Value:
        return self.held.split(text) if isinstance(text, (str, bytes)) and len(text) <= _TEXT else UNKNOWN

    def finditer(self, text: Value, *_: Value) -> Value:
        if not isinstance(text, (str, bytes)) or len(text) > _TEXT:
            return UNKNOWN
        return [Match(found) for found in self.held.finditer(text)]


class Match:
    """What a pattern found."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def group(self, *which: Value) -> Value:
        return self.found.group(*which)

    def groups(self, *_: Value) -> Value:
        return self.found.groups()

    def start(self, *which: Value) -> Value:
        return self.found.start(*which)

    def end(self, *which: Value) -> Value:
        return self.found.end(*which)

    def span(self, *which: Value) -> Value:
        return self.found.span(*which)

    def __getitem__(self, which: Value) -> Value:
        return self.found[which]


__all__ = ["Match", "Pattern", "grows"]
