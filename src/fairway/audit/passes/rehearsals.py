"""Steps on validation tokens that nothing has scored yet and that no reported number has seen: warm-ups that are thrown
away. An accepted departure (RULES.md (b), last list), which a strict audit names."""

from fairway.audit.case import Case
from fairway.audit.flow.events import Event, Score, Update
from fairway.audit.flow.tokens import related
from fairway.audit.passes.findings import passes_of
from fairway.audit.passes.reported import scores_of


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
    for update in trace.updates:
        if update.number > scores[-1].number:
            break
        mine = [tok for tok in update.learned if tok.data in which.data]
        forgotten = update.how == "gradient" and not (knows >> update.bit) & 1
        if mine and forgotten and not any(_scored_before(first, update) for first in said):
            return update
    return None


def _scored_before(first: Score, update: Update) -> bool:
    """Whether a loss was booked before the update, on tokens that it learned from, as a step of the same evaluation."""
    if first.number >= update.number or not (_in_one_turn(first, update) or _calls_shared(first, update) > 1):
        return False
    return any(related(tok, target) != "apart" for tok in update.learned for target in first.targets)


def _in_one_turn(first: Event, update: Event) -> bool:
    return bool(set(first.nest) & set(update.nest))


def _calls_shared(first: Event, update: Event) -> int:
    count = 0
    for mine, other in zip(first.stack, update.stack, strict=False):
        if mine != other:
            break
        count += 1
    return count


__all__ = ["thrown_away"]
