"""What learns while parts of the text are claimed: whether it begins anew with each claim, or is carried on to the
next one."""

import ast
from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.flow.events import Update
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.reported import scores_of
from fairway.audit.reading.tree import nodes
from fairway.audit.verdict import Place


def learning_in(case: Case, function: str) -> tuple[list[Update], Update | None] | None:
    """The steps on validation tokens in the loops of the function that claims, and the last of them whose state was
    made before the claim; None where no such loop could be followed. A step in which all ranks take part is no race.
    """
    trace, data = case.trace, passes_of(case)[0].data
    loops = {place for place, _ in _loops(case, function)}
    steps: list[Update] = []
    last = None
    before = 0
    for update in trace.updates:
        claiming = [each for each in update.nest if trace.loops.get(each[0]) in loops]
        mine = [tok for tok in update.learned if tok.data in data]
        if update.how != "gradient" or not claiming or not mine:
            continue
        steps.append(update)
        together = any(before < number <= update.number for number in trace.averaged)
        before = update.number
        if claiming[0] not in update.fresh and not together:
            last = update
    if steps and last is None and _hands_on(case, function):
        last = steps[-1]
    return (steps, last) if steps else None


def _hands_on(case: Case, function: str) -> bool:
    """Whether weights are read from a file and written to one in a loop of a function: each worker goes on with what
    another has left."""
    return any(
        {"load", "save"} <= {getattr(each.func, "attr", "") for each in nodes(loop) if isinstance(each, ast.Call)}
        for _, loop in _loops(case, function)
    )


def sorted_by_length(case: Case) -> Place | None:
    """Where documents are sorted by their lengths, of which what scores them learns; None where they are not."""
    which = passes_of(case)[0]
    for score in reversed(scores_of(case.trace, which.score, which.data)):
        learned = any(tok.data in which.data for each in case.trace.learned(score.knows) for tok in each.learned)
        if learned and any(tok.ordered for tok in score.targets):
            before = [place for number, place in case.trace.orders if number <= score.number]
            return before[-1] if before else score.place
    return None


def yields(case: Case, function: str) -> bool:
    """Whether the function of this name is a generator."""
    return any(
        isinstance(each, (ast.Yield, ast.YieldFrom))
        for script in case.script.all()
        for node in nodes(script.tree)
        if isinstance(node, ast.FunctionDef) and node.name == function
        for each in nodes(node)
    )


def _loops(case: Case, function: str) -> Iterator[tuple[Place, ast.AST]]:
    """The loops that stand in functions of this name."""
    for script in case.script.all():
        for node in nodes(script.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == function:
                for each in nodes(node):
                    if isinstance(each, (ast.While, ast.For, ast.AsyncFor)):
                        yield Place(script.path, script.line(each.lineno)), each


__all__ = ["learning_in", "sorted_by_length", "yields"]
