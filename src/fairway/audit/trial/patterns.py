"""Patterns of `match`, and what kind a value is."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

from fairway.audit.trial.arrays import Array
from fairway.audit.trial.files import Path
from fairway.audit.trial.host import Compute, Host
from fairway.audit.trial.operators import combine
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.values import UNKNOWN, Class, Frame, Lib, Obj, Unknown, Value

Fits = Callable[[Frame, Value], bool]
_KINDS: dict[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "set": set,
    "bool": bool,
    "bytes": bytes,
    "Tensor": (Array, Sum),
    "ndarray": Array,
    "Path": Path,
    "slice": slice,
    "range": range,
}


def is_a(value: Value, kind: Value) -> Value:
    """isinstance(value, kind), of one kind; UNKNOWN of a value that nobody knows."""
    if isinstance(value, Unknown):
        return UNKNOWN
    if isinstance(kind, Class):
        return isinstance(value, Obj) and kind in value.kind.line()
    name = kind.name if isinstance(kind, Lib) else ""
    if name in _KINDS and isinstance(value, _KINDS[name]):
        return True
    return isinstance(kind, Lib) and isinstance(value, Obj) and kind in value.kind.foreign


def fitting(host: Host, pattern: ast.pattern, compiled: Callable[[ast.expr], Compute]) -> Fits:
    """Whether a value fits a pattern, of which the names are bound as far as it does. What nobody knows fits all that
    says nothing of its value."""

    def inner(each: ast.pattern) -> Fits:
        return fitting(host, each, compiled)

    if isinstance(pattern, ast.MatchValue):
        value = compiled(pattern.value)
        return lambda frame, given: combine("Eq", given, value(frame)) is True
    if isinstance(pattern, ast.MatchSingleton):
        return lambda frame, given: given is pattern.value
    if isinstance(pattern, ast.MatchOr):
        options = [inner(each) for each in pattern.patterns]
        return lambda frame, given: any(option(frame, given) for option in options)
    if isinstance(pattern, ast.MatchAs):
        return _named(pattern.name, inner(pattern.pattern) if pattern.pattern is not None else None)
    if isinstance(pattern, ast.MatchSequence):
        return _in_a_row(pattern.patterns, inner)
    if isinstance(pattern, ast.MatchMapping):
        return _keyed(pattern, inner, compiled)
    assert isinstance(pattern, ast.MatchClass)
    return _of_kind(host, pattern, inner, compiled)


def _named(name: str | None, part: Fits | None) -> Fits:
    def fits(frame: Frame, given: Value) -> bool:
        held = part is None or part(frame, given)
        if held and name:
            frame.bind(name, given)
        return held

    return fits


def _in_a_row(patterns: Sequence[ast.pattern], inner: Callable[[ast.pattern], Fits]) -> Fits:
    """`a, *rest, b`"""
    star = next((n for n, each in enumerate(patterns) if isinstance(each, ast.MatchStar)), None)
    before = [inner(each) for each in patterns[:star]]
    after = [inner(each) for each in patterns[star + 1 :]] if star is not None else []
    rest = getattr(patterns[star], "name", None) if star is not None else None

    def fits(frame: Frame, given: Value) -> bool:
        few = len(before) + len(after)
        if isinstance(given, Unknown):
            given = (given,) * few
        if not isinstance(given, (tuple, list)) or (len(given) != few if star is None else len(given) < few):
            return False
        end = len(given) - len(after)
        if rest is not None:
            frame.bind(rest, list(given[len(before) : end]))
        parts = zip((*before, *after), (*given[: len(before)], *given[end:]), strict=True)
        return all(part(frame, each) for part, each in parts)

    return fits


def _keyed(
    pattern: ast.MatchMapping, inner: Callable[[ast.pattern], Fits], compiled: Callable[[ast.expr], Compute]
) -> Fits:
    """`{"name": name, **rest}`"""
    keys = [compiled(each) for each in pattern.keys]
    parts = [inner(each) for each in pattern.patterns]

    def fits(frame: Frame, given: Value) -> bool:
        asked = [key(frame) for key in keys]
        unknown = isinstance(given, Unknown)
        if not unknown and (not isinstance(given, dict) or any(key not in given for key in asked)):
            return False
        held = [given if unknown else given[key] for key in asked]
        if pattern.rest:
            left = given if unknown else {key: value for key, value in given.items() if key not in asked}
            frame.bind(pattern.rest, left)
        return all(part(frame, each) for part, each in zip(parts, held, strict=True))

    return fits


def _of_kind(
    host: Host, pattern: ast.MatchClass, inner: Callable[[ast.pattern], Fits], compiled: Callable[[ast.expr], Compute]
) -> Fits:
    """`int(n)`, which is the value itself, and `Point(x, y=0)`: attributes by `__match_args__` or the fields' order."""
    kind = compiled(pattern.cls)
    places = [inner(each) for each in pattern.patterns]
    words = [inner(each) for each in pattern.kwd_patterns]

    def fits(frame: Frame, given: Value) -> bool:
        asked = kind(frame)
        if is_a(given, asked) is False:
            return False
        if not isinstance(asked, Class):
            return all(part(frame, given) for part in places)
        order = asked.find("__match_args__")
        names = [*(order if isinstance(order, tuple) else asked.all_fields())][: len(places)]
        parts = zip((*names, *pattern.kwd_attrs), (*places, *words), strict=False)
        return all(part(frame, host.attribute(given, name)) for name, part in parts)

    return fits


__all__ = ["fitting", "is_a"]
