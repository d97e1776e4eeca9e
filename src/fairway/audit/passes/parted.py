"""What only several processes show: a table that each of them fills with what lies before its own part of the text
knows nothing too early; a part that begins before its share, or is filled up to the length of others, is counted by
two of them."""

from __future__ import annotations

import ast
import re
import weakref
from collections.abc import Iterator

import numpy as np

from fairway.audit.case import Case
from fairway.audit.flow.events import Event, Score, Trace, Update
from fairway.audit.passes.reported import Reported
from fairway.audit.passes.trials import FEW, counted
from fairway.audit.reading.tree import nodes
from fairway.audit.trial import Trial, run
from fairway.audit.trial.text import SHORT

_GROUPS = ((1, 2), (0, 2))  # the second of two processes, and the first one, where parts go to ranks in reverse
_THREE = ((0, 3), (1, 3), (2, 3))  # of two, a share that is filled up may lack nothing
_ONCE = 1.0 + 1e-6  # times, and what sums of weights are off
_TOKENS = re.compile(r"tok|val|text|stream|data|ids|buf", re.IGNORECASE)
_RANK = re.compile(r"(?<![a-z])rank(?!s)", re.IGNORECASE)  # and not how many there are: ranks.world
_OWN_RANK = re.compile(r"(?<![a-z_])rank\b", re.IGNORECASE)  # and not what each rank has: per_rank
# What hands out work: who takes what, nobody knows.
_STORE = re.compile(r"\b(?:Hash|TCP|File)Store\b|_get_default_store")
_Calls = tuple[tuple[int, ...], tuple[int, ...]]
_SEEN: weakref.WeakKeyDictionary[Trace, dict[_Calls, tuple[int | None, int | None]]] = weakref.WeakKeyDictionary()


def of_earlier_parts(case: Case, score: Score, filled: Update) -> bool:
    """Whether a process by itself fills nothing there, and one of two that fills something only what lies before all
    that it scores."""
    last, first = _of_others(case, score, filled)
    return first is not None and last is not None and last < first


def filled_by_others(case: Case, score: Score, filled: Update) -> bool:
    """Whether a process by itself fills nothing there, and one of two does: of that it says nothing."""
    return _of_others(case, score, filled)[0] is not None


def _of_others(case: Case, score: Score, filled: Update) -> tuple[int | None, int | None]:
    """The last token that one of two processes fills a table with, and the first target that it scores then, where a
    process by itself fills nothing; None for what is none."""
    calls, scoring = _apart(score, filled)
    seen = _SEEN.setdefault(case.trace, {})
    if (calls, scoring) not in seen:
        idle = _scored_from(case.trial, scoring) is not None and _filled_up_to(case.trial, calls) is None
        seen[calls, scoring] = _of_two(case, calls, scoring) if idle else (None, None)
    return seen[calls, scoring]


def _of_two(case: Case, calls: tuple[int, ...], scoring: tuple[int, ...]) -> tuple[int | None, int | None]:
    trial = case.trial
    for group in _GROUPS:
        alone = run(case.script, case.settings, SHORT, trial.limits.forced, False, trial.native, group=group)
        last, first = _filled_up_to(alone, calls), _scored_from(alone, scoring)
        if first is None or last is not None:
            return last, first
    return None, None


def _apart(score: Score, filled: Update) -> _Calls:
    """The calls that fill, and those that sum: what a helper makes is summed by who calls it."""
    calls, scoring = _calls(filled), _calls(score)
    apart = next((n for n, (one, other) in enumerate(zip(calls, scoring, strict=False)) if one != other), len(calls))
    return calls, scoring[: apart + 1]


def _filled_up_to(trial: Trial, calls: tuple[int, ...]) -> int | None:
    """The last token of the parts of the text that are taken in these calls; None where none is."""
    return max((place for way, place in trial.reach.items() if way[: len(calls)] == calls), default=None)


def _scored_from(trial: Trial, calls: tuple[int, ...]) -> int | None:
    """The first target that is summed in these calls; None where none is."""
    times = (times for way, times in trial.booked.items() if way[: len(calls)] == calls and times.any())
    return min((int(np.flatnonzero(each)[0]) for each in times), default=None)


def counted_by_several(case: Case, which: Reported) -> tuple[int, int, int] | None:
    """How many targets processes count besides one another, how many processes those are, and the line that begins a
    share before its own, ends it behind, or fills it up with what is there already; None where no line does so, or
    none are."""
    tree = case.body.tree
    for lines, groups in ((_moved(tree), _GROUPS), (_filled_up(tree), _THREE)):
        line = next(lines, 0)
        twice = _counted_twice(case, which, groups) if line and not _STORE.search(case.body.text) else 0
        if twice >= FEW:
            return twice, len(groups), line
    return None


def _counted_twice(case: Case, which: Reported, groups: tuple[tuple[int, int], ...]) -> int:
    """How many targets several processes count, each over its share of a short text, that one process counts once."""
    trial, times = case.trial, np.zeros(SHORT)
    whole = counted(run(case.script, case.settings, SHORT, trial.limits.forced, False, trial.native), which)
    for group in groups if whole is not None else ():
        alone = run(case.script, case.settings, SHORT, trial.limits.forced, False, trial.native, group=group)
        found = counted(alone, which)
        if found is None or whole is None or len(found.times) != SHORT:
            continue
        if found.said[-1].sum.ways() & whole.said[-1].sum.ways():  # else it has no share, and told another number
            times += found.times
    both = times > _ONCE
    return int((both & (whole.times <= _ONCE)).sum()) if whole is not None and both.sum() >= FEW else 0


def _filled_up(tree: ast.AST | None) -> Iterator[int]:
    """Lines that make a list longer by as much as its length asks for: `batches += batches[: -len(batches) % world]`,
    `mine = mine + mine[-1:] * (-len(mine) % rows)`, `mine.extend(first[: most - len(mine)])`, and loops that do so
    until it fits."""
    for node in nodes(tree):
        if isinstance(node, ast.While):
            grown = {ast.unparse(call.func.value) for call in _calls_of(node, ("append", "extend", "insert"))}
            if grown & _measured(node.test):
                yield node.lineno
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            if ast.unparse(node.target) in _measured(node.value):
                yield node.lineno
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.Add):
            name = ast.unparse(node.value.left)
            if name in _measured(node.value.right):
                yield node.lineno
        elif isinstance(node, ast.Expr):
            for call in _calls_of(node, ("extend",)):
                if any(ast.unparse(call.func.value) in _measured(arg) for arg in call.args):
                    yield node.lineno


class _Method(ast.Call):
    func: ast.Attribute


def _calls_of(node: ast.AST, names: tuple[str, ...]) -> Iterator[_Method]:
    for each in nodes(node):
        if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.func.attr in names:
            yield each  # type: ignore[misc]


def _measured(value: ast.AST) -> set[str]:
    """What `-len(x) % n` and `most - len(x)` measure."""
    rests = (each for each in nodes(value) if isinstance(each, ast.BinOp) and isinstance(each.op, (ast.Mod, ast.Sub)))
    return {
        ast.unparse(call.args[0])
        for rest in rests
        for call in nodes(rest)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "len" and len(call.args) == 1
    }


def _moved(tree: ast.AST | None) -> Iterator[int]:
    """Lines that move back where the share of a rank begins, `lo, hi = share(n, rank); lo = max(0, lo - run_in)`, or
    take what lies behind it, `windows[lo : hi + 1]`; of tokens that one is the last target."""
    for function in (node for node in nodes(tree) if isinstance(node, ast.FunctionDef)):
        shared: set[str] = set()
        for node in nodes(function):
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Sub) and ast.unparse(node.target) in shared:
                yield node.lineno
            if isinstance(node, ast.Subscript) and _goes_on(node, shared):
                yield node.lineno
            if isinstance(node, ast.Call) and _ends_behind(node):
                yield node.lineno
            if not isinstance(node, ast.Assign):
                continue
            names = {each.id for each in nodes(node.targets[0]) if isinstance(each, ast.Name)}
            less = (
                each.left for each in nodes(node.value) if isinstance(each, ast.BinOp) and isinstance(each.op, ast.Sub)
            )
            if len(names) == 1 and any(isinstance(each, ast.Name) and each.id in names & shared for each in less):
                yield node.lineno
            if _RANK.search(ast.unparse(node.value)):
                shared |= names
                if not isinstance(node.value, ast.Subscript) and any(map(_beyond_its_share, nodes(node.value))):
                    yield node.lineno


def _beyond_its_share(node: ast.AST) -> bool:
    """n * (rank + 1) // size + 1; not rank + 1, nor what is taken from there, lo = rank * n + 1: a trial has to show
    that two processes count the same."""
    more = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and isinstance(node.right, ast.Constant)
    share = node.left if isinstance(node, ast.BinOp) and more else None
    return isinstance(share, ast.BinOp) and bool(_OWN_RANK.search(ast.unparse(share)))


def _ends_behind(call: ast.Call) -> bool:
    """range(cuts[rank], min(cuts[rank + 1] + 1, total))"""
    if getattr(call.func, "id", "") != "range" or len(call.args) < 2 or not _RANK.search(ast.unparse(call.args[0])):
        return False
    more = (each for each in nodes(call.args[1]) if isinstance(each, ast.BinOp) and isinstance(each.op, ast.Add))
    return any(isinstance(each.left, ast.Subscript) and isinstance(each.right, ast.Constant) for each in more)


def _goes_on(node: ast.Subscript, shared: set[str]) -> bool:
    """windows[lo : hi + 1], windows[... : n * (rank + 1) // world + 1], where the first part ends the share of a rank;
    not block[lo : lo + span], which says how long it is."""
    begun, end = (node.slice.lower, node.slice.upper) if isinstance(node.slice, ast.Slice) else (None, None)
    if not isinstance(end, ast.BinOp) or not isinstance(end.op, ast.Add) or _TOKENS.search(ast.unparse(node.value)):
        return False
    share = (
        isinstance(end.left, ast.BinOp)
        and isinstance(end.left.op, ast.FloorDiv)
        and isinstance(end.right, ast.Constant)
    )
    own = share and bool(_RANK.search(ast.unparse(end.left)))
    return own or getattr(end.left, "id", "") in shared - {getattr(begun, "id", "")}


def _calls(event: Event) -> tuple[int, ...]:
    return tuple(place.line for place in event.stack[:-1])


__all__ = ["counted_by_several", "filled_by_others", "of_earlier_parts"]
