"""Of two predictions for a token the better one is scored, which only somebody who knows the token can tell."""

from fairway.audit.case import Case
from fairway.audit.passes.charged import gate_by_losses
from fairway.audit.passes.past import places_of_others
from fairway.audit.terms.choices import forked
from fairway.audit.terms.gates import Gates
from fairway.audit.terms.reading import Reading
from fairway.audit.terms.term import Term
from fairway.audit.terms.verdicts import clean, unsaid
from fairway.audit.verdict import Finding, Place
from fairway.audit.weighing import is_sound

ID = "oracle-gate"
CHARGE = "the better of two predictions is chosen by comparing their losses on the target"
CLAUSE = 'RULES.md (b) 1 and 2, (c) "Oracle safety gate"'
APART = "weighing"
_COMPARED = (
    "Two predictions of the same token are compared by how well they did on it and the better one is scored; the "
    "choice reads the target, and the sum over the vocabulary exceeds one."
)


def check(case: Case) -> Finding:
    reading = case.reading
    others = places_of_others(case.trace) if reading.gates else set()
    for gates in reading.gates:
        cut = next(gates.clipped(), None)
        if cut is not None and not is_sound(case):
            evidence = (
                "Losses are cut off at a number once the target is known; no distribution gives every token at least "
                "that probability unless its parts are mixed before."
            )
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(cut), reading.way(gates.of.term, cut))
        term = next((one for one in gates.oracles() if not _by_others(reading, gates, one, others)), None)
        if term is not None and not _is_paid_for(case):
            return Finding(ID, "violates", _COMPARED, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
    place = gate_by_losses(case)
    if place is not None and not (_is_told_apart(reading, place) and is_sound(case)):
        return Finding(ID, "violates", _COMPARED, CLAUSE, place)
    if not reading.reported:
        return unsaid(ID, CLAUSE)
    return clean(ID, CLAUSE, "no loss that reaches the score is the smaller of two on the same target")


def _is_paid_for(case: Case) -> bool:
    """Whether the prices of all tokens at one place come to one, each worked out as the target: of one row that all of
    them are read from, one context may say nothing of the choice."""
    return is_sound(case) and case.weight is not None and not case.weight.same


def _is_told_apart(reading: Reading, place: Place) -> bool:
    """Whether what is compared at a place, by all that is read of it, reads no target: how sure two rows are."""
    tests = [
        (gates, fork[0])
        for gates in reading.gates
        for term in gates.nodes
        if reading.place(term) == place and (fork := forked(term)) is not None
    ]
    return bool(tests) and not any(gates.kinds(test) for gates, test in tests)


def _by_others(reading: Reading, gates: Gates, term: Term, others: set[Place]) -> bool:
    """Whether a choice is one by losses of other tokens: of the context of each window."""
    fork = forked(term)
    tests = list(gates.compared(fork[0])) if fork is not None else []
    return bool(tests) and all(reading.place(one) in others for one in tests)
