"""Passes that come round once more, and the least of several, as a trial over a short text counts them."""

from __future__ import annotations

import ast
import weakref

import numpy as np

from fairway.audit.case import Case
from fairway.audit.flow.events import Trace, Update
from fairway.audit.passes.groups import SIZES, in_smaller_groups
from fairway.audit.passes.reported import Reported
from fairway.audit.passes.trials import FEW, Counts, counted, counts_of, learns, parting, steps_of
from fairway.audit.reading.tree import last_name, nodes

_TAUGHT = 0.5  # of what is scored again: the last chunk is often not learned from
_MOST = 0.5  # of the targets: an epoch of them
_NEARLY = 0.95  # of those that are summed

Found = tuple[str, str, int]

_SEEN: weakref.WeakKeyDictionary[Trace, dict[Reported, Found | None]] = weakref.WeakKeyDictionary()


def epochs(case: Case, which: Reported, counts: Counts, some: bool = False) -> Found | None:
    """Whether most targets of the score were summed by the same calls before, and learned from since, while each counts
    once: the rule, by whether all were summed before any was again, a sentence, and the loop over the passes. some:
    whether a few of them are enough."""
    trial = counts.trial
    booked = {way: trial.booked[way] for way in sorted(counts.said[-1].sum.ways()) if way in trial.booked}
    again = int(np.any([times > 1 for times in booked.values()], axis=0).sum()) if booked else 0
    late, most = int((counts.late > 0).sum()), _MOST * (trial.length - 1)
    least = FEW if some else most
    if again < least or late < _TAUGHT * again or len(counts.more) or trial.fitted:
        return None
    if not learns(case, which) and steps_of(case, which):
        return None  # several states: the walk tells them apart; where it sees no gradient, the trial's word stands
    way = next(way for way, times in booked.items() if (times > 1).any())
    step = next((lesson.stack for lesson in trial.lessons if lesson.asked), None)
    if step is None:
        return None
    evidence = (
        f"Worked out for a text of {counts.trial.length - 1:,} targets, {again:,} of them are summed more than once at "
        f"line {way[-1]}, with a step at line {step[-1]} between; the sum is begun anew, and the last one is what "
        "counts."
    )
    mine, theirs = parting(way, step), parting(step, way)
    loops = (
        node.lineno
        for node in nodes(case.body.tree)
        if isinstance(node, (ast.For, ast.While))
        and all(node.lineno <= at <= (node.end_lineno or 0) for at in (mine, theirs))
    )
    # A chunk alone may be most of the text.
    whole = again >= most and trial.again[way] >= _NEARLY * np.count_nonzero(booked[way])
    return "multi-epoch-last" if whole else "rescoring-after-adaptation", evidence, min(loops, default=mine)


def passed_again(case: Case, which: Reported, counts: Counts) -> Found | None:
    """The same, where of several chunks the first ones alone may come round once more: in trials with smaller ones.
    Asked by several rules, worked out once."""
    known = _SEEN.setdefault(case.trace, {})
    if which not in known:
        known[which] = _passed_again(case, which, counts)
    return known[which]


def _passed_again(case: Case, which: Reported, counts: Counts) -> Found | None:
    found = epochs(case, which, counts)
    if found is not None and found[0] != "multi-epoch-last":
        return found
    if found is None and not _comes_round(case, counts):
        return None
    for smaller in SIZES:
        fine = in_smaller_groups(case, smaller=smaller)
        few = counted(fine, which) if fine is not None else None
        part = epochs(case, which, few, some=True) if few is not None else None
        if part is not None and (found is None or part[0] != found[0]):
            return part
    return found


def _comes_round(case: Case, counts: Counts) -> bool:
    """Whether a loop around a sum of the score goes through two ranges, [*range(chunks), *range(cold)], or through what
    a name holds that was bound to them."""
    lines = {line for way in counts.said[-1].sum.ways() for line in way}
    twice = {
        target.id
        for node in nodes(case.body.tree)
        if isinstance(node, ast.Assign) and _ranges(node.value) > 1
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return any(
        (_ranges(node.iter) > 1 or any(isinstance(each, ast.Name) and each.id in twice for each in nodes(node.iter)))
        and any(node.lineno < line <= (node.end_lineno or 0) for line in lines)
        for node in nodes(case.body.tree)
        if isinstance(node, ast.For)
    )


def _ranges(value: ast.expr) -> int:
    """How many ranges are put one behind the other."""
    if not isinstance(value, (ast.List, ast.Tuple, ast.BinOp)) and last_name(getattr(value, "func", None)) != "chain":
        return 0
    return sum(isinstance(each, ast.Call) and last_name(each.func) == "range" for each in nodes(value))


def repeats(case: Case, which: Reported, step: Update) -> bool:
    """Whether a trial shows that all that a step learned from had been scored by then, and that all is scored once
    more: an epoch, where the walk cannot tell one turn of a loop over passes and chunks from the next."""
    counts = counts_of(case, which)
    calls = tuple(place.line for place in step.stack[:-1])
    lessons = [each for each in counts.trial.lessons if each.stack[:-1] == calls] if counts is not None else []
    if counts is None or not lessons or any(each.early for each in lessons):
        return False
    found = epochs(case, which, counts)
    return found is not None and found[0] == "multi-epoch-last"


def best_of(counts: Counts) -> Found | None:
    """Whether the score was chosen as the least of sums over the same targets: the rule, a sentence, and where."""
    trial, told = counts.trial, counts.said[-1].sum
    for line, kept, compared in trial.picked:
        counted = [each.counts(trial.length)[0] > 0 for each in compared]
        again = int((np.sum(counted, axis=0) > 1).sum())
        if again >= _MOST * (trial.length - 1) and any(told.made_of(each) for each in kept):
            evidence = (
                f"Worked out for a text of {trial.length - 1:,} targets, the least of {len(compared)} sums is what "
                f"counts, and {again:,} targets are in more than one of them."
            )
            return "min-over-passes", evidence, line
    return None
