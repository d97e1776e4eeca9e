"""Steps on validation tokens that nothing has scored yet and that no reported number has seen: warm-ups that are thrown
away. An accepted departure (RULES.md (b), last list), which a strict audit names."""

import ast

from fairway.audit.case import Case
from fairway.audit.flow.events import Event, Score, Update
from fairway.audit.flow.tokens import related
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.reported import scores_of
from fairway.audit.reading.tree import nodes
from fairway.audit.verdict import Place


def thrown_away(case: Case) -> Update | None:
    """The first step on validation tokens, in an evaluation, before any number that is said has scored them there;
    None where there is none."""
    which, _, _ = passes_of(case)
    trace = case.trace
    scores = scores_of(trace, which.score, which.data)
    if not scores:
        return None
    knows = 0
    for score in scores:
        knows |= score.knows
    said = scores_of(trace, tuple(trace.said), which.data)
    functions = _Functions(case)
    for update in trace.updates:
        if update.number > scores[-1].number:
            break
        mine = [tok for tok in update.learned if tok.data in which.data]
        forgotten = update.how == "gradient" and not (knows >> update.bit) & 1
        if not mine or not forgotten:
            continue
        near = max((functions.shared(score, update) for score in scores if score.number > update.number), default=0)
        if not any(_scored_before(first, update, functions, near) for first in said):
            return update
    return None


class _Functions:
    """Which function of the script a place stands in."""

    def __init__(self, case: Case) -> None:
        self._spans: dict[str, list[tuple[int, int]]] = {}
        for script in case.script.all():
            made = [
                each
                for each in nodes(script.tree)
                if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            ]
            self._spans[script.path] = [(each.lineno, each.end_lineno or each.lineno) for each in made]

    def of(self, place: Place) -> tuple[int, int]:
        """Its first and last line: (0, 0) for the main program."""
        around = [span for span in self._spans.get(place.file, ()) if span[0] <= place.line <= span[1]]
        return max(around, default=(0, 0))

    def shared(self, one: Event, other: Event) -> int:
        """How many calls two events stand in together: one line may call several functions, one after the other."""
        for count, (mine, its) in enumerate(zip(one.stack, other.stack, strict=False)):
            if mine != its:
                return count if self.of(mine) == self.of(its) else max(count - 1, 0)
        return min(len(one.stack), len(other.stack))


def _scored_before(first: Score, update: Update, functions: _Functions, near: int) -> bool:
    """Whether a loss was booked before the update, on tokens that it learned from, as a step of the same evaluation.

    near: how many calls the update has in common with the score itself: what has fewer was another evaluation.
    """
    if first.number >= update.number:
        return False
    shared = functions.shared(first, update)
    if not set(first.nest) & set(update.nest) and (shared < 2 or shared < near):
        return False
    return any(related(tok, target) != "apart" for tok in update.learned for target in first.targets)


__all__ = ["thrown_away"]
