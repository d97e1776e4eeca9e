"""Sums that are too large, of a form that no rule of the distribution knows."""

from fairway.audit.case import Case
from fairway.audit.flow.events import Update
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.documents import with_short
from fairway.audit.passes.trials import mixes
from fairway.audit.terms.mixtures import gold_ratios, spread_over_bytes
from fairway.audit.weighing.alternatives import Weight, is_whole
from fairway.audit.weighing.foreseeing import knew


def excess(case: Case) -> Weight | None:
    """What all tokens at one place add up to, where that is too much, the score is no plain softmax, and neither a rule
    of the distribution nor the walk says why."""
    gates = case.reading.gates
    said = (
        found
        for each in gates
        for found in (each.oracles(), each.clipped(), gold_ratios(each), spread_over_bytes(each))
    )
    which, faults, _ = passes_of(case)
    whole = all(is_whole(each.of.term) for each in gates) and not mixes(case, which) and not with_short(case, which)
    if whole or any(next(found, None) is not None for found in said):
        return None
    if any(isinstance(each.cause, Update) and each.cause.how == "table" for each in faults) and knew(case):
        return None
    weight = case.weight  # of a gate by the target another rule says it, where every token has a row of its own
    one_row = weight is not None and weight.same
    if not one_row and any(next(each.gated(), None) is not None for each in gates):
        return None
    return weight if weight is not None and weight.too_much and not (weight.differs or weight.gate) else None


__all__ = ["excess"]
