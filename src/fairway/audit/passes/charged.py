"""What the score is charged with, of all that the walk found, as a trial bears it out."""

from __future__ import annotations

import ast
import weakref
from dataclasses import replace

from fairway.audit.case import Case
from fairway.audit.flow.events import Choice, Score, Trace, Update
from fairway.audit.passes.consequences import without_consequences
from fairway.audit.passes.faults import Fault, Passes, one_row
from fairway.audit.passes.parted import of_earlier_parts
from fairway.audit.passes.reported import Reported, reported
from fairway.audit.passes.rounds import best_of, epochs, repeats
from fairway.audit.passes.trials import counts_of, learned_in_turn, order_of, parting
from fairway.audit.passes.vectors import fitted
from fairway.audit.reading.tree import nodes
from fairway.audit.terms.choices import forked
from fairway.audit.verdict import Place

_SEEN: weakref.WeakKeyDictionary[Trace, tuple[Reported, list[Fault], list[Fault]]] = weakref.WeakKeyDictionary()

_OF_THE_ORDER = ("multi-epoch-last", "training-before-scoring", "rescoring-after-adaptation")
_OF_TABLES = ("training-before-scoring", "two-pass-cache")
_OF_VECTORS = ("slot-on-scored", "slot-shared-delta")
_BY_LOSSES = ("choice-by-validation", "temperature-from-validation")


def passes_of(case: Case) -> tuple[Reported, list[Fault], list[Fault]]:
    """What is reported; the faults of the score; the faults of other final numbers. Computed once for a trace."""
    trace = case.trace
    found = _SEEN.get(trace)
    if found is None:
        which = reported(trace, case.submission)
        passes = Passes(trace, which)
        own, beside = (
            without_consequences(trace, passes.faults(said), which.data) for said in (which.score, which.others)
        )
        own = [tried for fault in own if (tried := _as_tried(case, which, fault)) is not None]
        found = _SEEN[trace] = which, own, beside
    return found


def _as_tried(case: Case, which: Reported, fault: Fault) -> Fault | None:
    """A fault of the order as a trial bears it out: none where every target was scored before the step learned from it,
    and no second epoch where each was scored but once; none of a vector that was fitted to no target that it scores."""
    if fault.kind in _OF_VECTORS and isinstance(fault.cause, Update):
        return _vector_as_tried(case, which, fault, fault.cause)
    # A vector beside a temperature is none; a temperature that is fitted to what it scores stays a fault.
    if fault.kind == "temperature-from-validation" and isinstance(fault.cause, Update):
        apart = fitted(case, which, fault.cause, shared=False) == "apart"
        return None if apart or order_of(case, which, fault.score, fault.cause) == "first" else fault
    if fault.kind == "choice-by-validation":
        return replace(fault, kind="min-over-passes") if _is_least_sum(case, which, fault) else fault
    filled = fault.cause if isinstance(fault.cause, Update) and fault.cause.how == "table" else None
    recalled = filled is not None and filled.stack in case.trace.recalled
    if filled is not None and fault.kind in _OF_TABLES and (recalled or of_earlier_parts(case, fault.score, filled)):
        return None
    if fault.kind == "two-pass-cache" and isinstance(fault.cause, Update):
        return None if _filled_with_what_was_learned(case, which, fault.score, fault.cause) else fault
    if fault.kind not in _OF_THE_ORDER or not isinstance(fault.cause, Update):
        return fault
    order = order_of(case, which, fault.score, fault.cause)
    ahead = order == "late" and fault.kind == "multi-epoch-last"
    if ahead or (order in ("late", "own") and _of_another_pass(case, fault)):
        return replace(fault, kind="training-before-scoring")
    if fault.kind == "training-before-scoring" and repeats(case, which, fault.cause):
        return replace(fault, kind="multi-epoch-last")
    if fault.kind == "multi-epoch-last" and _part_by_part(case, which):
        return replace(fault, kind="rescoring-after-adaptation")
    return None if order == "first" else fault


def _is_least_sum(case: Case, which: Reported, fault: Fault) -> bool:
    """Whether a trial shows that what is chosen there is the score itself, the least of several sums over the text."""
    counts = counts_of(case, which) if isinstance(fault.cause, Choice) and fault.cause.form == "min" else None
    found = best_of(counts) if counts is not None else None
    return found is not None and case.place(found[2]) == fault.cause.place


def _part_by_part(case: Case, which: Reported) -> bool:
    """Whether a trial shows that each chunk is scored again before the next one is scored: no epoch over the text."""
    counts = counts_of(case, which)
    found = epochs(case, which, counts) if counts is not None else None
    return found is not None and found[0] == "rescoring-after-adaptation"


def _of_another_pass(case: Case, fault: Fault) -> bool:
    """Whether what was scored before was scored by another evaluation, whose number is none that was settled: the one
    that is reported comes once, after the step. Not where the step follows those scores in the turns of one loop over
    the text: that was a pass of its own, and this is the second."""
    if fault.kind != "rescoring-after-adaptation" or fault.before is None or not isinstance(fault.cause, Update):
        return False
    cutting = {loop for tok in fault.before.targets for loop, _, _ in tok.spans}
    turns = dict(fault.before.nest)
    for loop, turn in fault.cause.nest:
        if loop in cutting and turns.get(loop) == turn and case.trace.in_one_call(loop, fault.before, fault.cause):
            return False
    ways = list(zip(fault.before.stack, fault.score.stack, strict=False))
    apart = next((n for n, (one, other) in enumerate(ways) if one != other), len(ways))
    inside = fault.cause.stack[: apart + 1] == fault.score.stack[: apart + 1]  # the step is one of this very evaluation
    return inside or fault.before.stack[apart + 1 :] != fault.score.stack[apart + 1 :]


def _filled_with_what_was_learned(case: Case, which: Reported, score: Score, filled: Update) -> bool:
    """Whether a table is filled with what a step beside it, in the same turn, has learned from, of which a trial shows
    that it had been scored: a group of documents that the walk cannot tell from the next one."""
    turns = dict(filled.nest)
    for step in case.trace.updates:
        shared = [(loop, turn) for loop, turn in step.nest if loop in turns]
        beside = step.how == "gradient" and shared and all(turns[loop] == turn for loop, turn in shared)
        ahead = step.number < filled.number or _scored_ahead(case.trace, score, filled)
        if not beside or not ahead or order_of(case, which, score, step) != "first":
            continue
        ways = [tuple(place.line for place in each.stack) for each in (filled, step)]
        if _handed(case, parting(*ways)) & _handed(case, parting(*reversed(ways))):
            return True
    return False


def _scored_ahead(trace: Trace, score: Score, filled: Update) -> bool:
    """Whether the losses are made before a table is filled in the same turn."""
    turns = dict(filled.nest)
    made = (each for each in trace.scores if each.stack == score.stack and each.number < filled.number)
    return any(turns == {loop: turn for loop, turn in each.nest if loop in turns} for each in made)


def _handed(case: Case, line: int) -> set[str]:
    """The names that a line hands over as they are, or parts of what they name, of those that change in a loop."""
    tree = case.body.tree
    calls = [each for each in nodes(tree) if isinstance(each, ast.Call) and each.lineno == line]
    given = {name for call in calls for arg in call.args if (name := _root(arg))}
    loops = [each for each in nodes(tree) if isinstance(each, (ast.For, ast.While))]
    around = [each for each in loops if each.lineno <= calls[0].lineno <= (each.end_lineno or 0)] if calls else []
    bound = {
        part.id
        for loop in around
        for part in nodes(loop)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }
    return given & bound


def _root(node: ast.expr) -> str:
    """`view` of view, view.target and view.mask.float()."""
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else ""


def _vector_as_tried(case: Case, which: Reported, fault: Fault, cause: Update) -> Fault | None:
    """Where a trial tells contexts from what is scored by numbers, masks that the walk cannot follow are none."""
    shared = fault.kind == "slot-shared-delta"
    if not (shared or _beside_others(case, cause)) and order_of(case, which, fault.score, cause) == "first":
        return None  # adapters in slots: each chunk is scored before the step on it
    turned = None if shared else learned_in_turn(case, which, fault.score, cause)
    if turned is not None:
        return replace(fault, kind=turned, doubt="")
    shown = fitted(case, which, cause, shared)
    if shown != "apart":
        return replace(fault, doubt="") if shown == "met" else fault
    if not shared and one_row(cause) and fitted(case, which, cause, shared=True) == "met":
        return replace(fault, kind="slot-shared-delta", doubt="")
    return None


def _beside_others(case: Case, cause: Update) -> bool:
    """Whether the same calls take steps of something else, which leave the same mark in a trial."""
    steps = (each for each in case.trace.updates if each.stack[:-1] == cause.stack[:-1])
    return any(each.state is not cause.state for each in steps)


def is_of_table(fault: Fault) -> bool:
    """Whether a fault is of what was written into an array, and no gradient's."""
    return isinstance(fault.cause, Update) and fault.cause.how in ("written", "table")


def all_of_tables(case: Case, rule: str) -> bool:
    """Whether the score breaks a rule by such faults alone; not where it does not break it."""
    mine = [fault for fault in passes_of(case)[1] if fault.kind == rule]
    return bool(mine) and all(map(is_of_table, mine))


def of_no_step(case: Case) -> bool:
    """Whether the walk charges the score with no step and no choice over passes: with nothing, or with what is written
    into arrays and what is chosen on the way to a price, of which others speak. A trial's word on the order of lessons
    and scores stands then."""
    return all(is_of_table(fault) or _is_in_price(case, fault) for fault in passes_of(case)[1])


def _is_in_price(case: Case, fault: Fault) -> bool:
    return fault.kind in _BY_LOSSES and (in_price(case, fault.cause.place) or is_gate(case, fault))


def in_price(case: Case, place: Place) -> bool:
    """Whether what is worked out at a place goes into the price of a token."""
    return any(place == case.reading.place(term) for gates in case.reading.gates for term in gates.nodes)


def chosen_by_losses(case: Case) -> bool:
    """Whether the score hangs on a choice by validation losses: rules of the order say so."""
    return any(fault.kind in _BY_LOSSES and not _is_in_price(case, fault) for fault in passes_of(case)[1])


def gate_by_losses(case: Case) -> Place | None:
    """Where predictions of tokens are compared by how well they did, in the turn of a loop over the text in which these
    tokens are scored with what came of it."""
    return next((fault.cause.place for fault in passes_of(case)[1] if _in_its_turn(fault)), None)


def _in_its_turn(fault: Fault) -> bool:
    cause, score = fault.cause, fault.score
    if fault.kind not in _BY_LOSSES or not isinstance(cause, Choice) or cause.form == "fit" or cause.nest != score.nest:
        return False
    cut = {loop for tok in score.targets for loop, _, _ in tok.spans}
    return any(loop in cut for loop, _ in cause.nest)


def is_gate(case: Case, fault: Fault) -> bool:
    """Whether a choice is one between predictions token by token, by the token itself: a rule of the distribution's."""
    if fault.kind in _BY_LOSSES and fault.cause.place == gate_by_losses(case):
        return True
    if fault.kind not in _BY_LOSSES or not isinstance(fault.cause, Choice):
        return False
    loops, around = ([loop for loop, _ in each.nest] for each in (fault.cause, fault.score))
    made = ([loop for loop, _ in each.nest] for each in case.trace.scored(fault.cause.losses))
    cut = around[: len(loops)] == loops and loops in made  # into windows, afterwards, in a loop of their own
    if fault.cause.nest != fault.score.nest and not cut:
        return False
    for gates in case.reading.gates:
        for term in (*gates.oracles(), *gates.gated()):
            fork = forked(term)
            tests = (one for one in gates.of.below(fork[0]) if one.op == "compare") if fork is not None else ()
            if any(case.reading.place(one) == fault.cause.place for one in (term, *tests)):
                return True
    return False
