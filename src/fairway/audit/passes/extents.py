"""Who says how much of the text is gone through: a helper that is told from where to where does not."""

from __future__ import annotations

import ast

from fairway.audit.case import Case
from fairway.audit.flow.events import Update
from fairway.audit.passes.reaching import around
from fairway.audit.reading.tree import last_name, nodes
from fairway.audit.verdict import Place

_SIZES = ("len", "numel", "size", "nelement")


def extent_of(case: Case, update: Update, outermost: Place, place: Place) -> Place:
    """The line of an update's way that says how much is learned, from a place outwards, no further than `outermost`:
    the innermost loop or call that is not told so by its function's parameters, `fill(0, total)` of `def fill(lo, hi):
    for at in range(lo, hi): ...`; the outermost where all are. The place itself where a line says nothing of it."""
    way = update.stack
    if outermost not in way or place not in way or any(each.file != case.body.path for each in way):
        return place
    for at in range(way.index(place), way.index(outermost), -1):
        bounds = _bounds(case, way[at].line, at + 1 < len(way))
        if bounds is None:
            continue
        if not bounds:
            return place
        if not bounds & _told(case, way[at].line):
            return way[at]
    return outermost if way.index(outermost) < way.index(place) else place


def _bounds(case: Case, line: int, called: bool) -> set[str] | None:
    """The names that say how much: in what the loop around a line goes through, or in what a call is given. None where
    the loop goes through settings, `for order in self.orders`, in a function that is told a part of the text."""
    within = around(case, line) or case.body.tree
    loops = [
        node for node in nodes(within) if isinstance(node, ast.For) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    if loops and all(isinstance(each.iter, ast.Attribute) for each in loops) and _told(case, line):
        return None
    if loops:
        return _names([max(loops, key=lambda each: each.lineno).iter])
    calls = [node for node in nodes(case.body.tree) if isinstance(node, ast.Call) and node.lineno == line]
    given = [[*each.args, *(word.value for word in each.keywords)] for each in calls if called]
    return _names(max(given, key=len, default=[]))


def _names(values: list[ast.expr]) -> set[str]:
    """Those that are numbers themselves; not of len(ids) and ids.numel(): who is given an array goes through all."""
    sized = {
        id(part)
        for value in values
        for each in nodes(value)
        if isinstance(each, ast.Call) and last_name(each.func) in _SIZES
        for part in nodes(each)
    }
    inside = (each for value in values for each in nodes(value) if id(each) not in sized)
    return set(map(last_name, inside)) - {"", "self", "range"}


def _told(case: Case, line: int) -> set[str]:
    """The parameters of the function around a line."""
    function = around(case, line)
    spec = function.args if function is not None else None
    return {each.arg for each in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)} - {"self"} if spec else set()


__all__ = ["extent_of"]
