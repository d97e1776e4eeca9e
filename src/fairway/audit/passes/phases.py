"""Phased adaptation: beside adapters that are made for each document, the model itself learns from documents that were
scored, and goes on with the rest. An accepted departure (RULES.md (b), last list), which a strict audit names."""

from fairway.audit.case import Case
from fairway.audit.flow.events import Update
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.tokens import related
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.reported import scores_of


def phase_of(case: Case) -> Update | None:
    """The first step of a state that is carried on, on validation tokens that were scored with a state of their own;
    None where one state alone learns, or each begins anew."""
    trace, which = case.trace, passes_of(case)[0]
    scores = scores_of(trace, which.score, which.data)
    knows = 0
    for score in scores:
        knows |= score.knows
    steps = [
        update
        for update in trace.learned(knows)
        if update.how == "gradient" and any(tok.data in which.data for tok in update.learned)
    ]
    own = {update.state for update in steps if _anew(update)}
    kinds = {_kind(state) for state in own}
    for update in steps:
        if _anew(update) or not own or _kind(update.state) in kinds:  # an adapter that is kept is no model
            continue
        earlier = [score for score in scores if score.number < update.number and score.states & own]
        if any(related(tok, target) != "apart" for s in earlier for target in s.targets for tok in update.learned):
            return update
    return None


def _kind(state: Obj | None) -> object:
    """Of what class a state is; what kind of thing, where it is of none of the script's own."""
    return None if state is None else state.data if state.kind == "instance" else state.kind


def _anew(update: Update) -> bool:
    """Whether its state was made, or put back, in the turn of a loop that it learns in."""
    return bool(update.fresh) and update.nest[: len(update.fresh)] == update.fresh


__all__ = ["phase_of"]
