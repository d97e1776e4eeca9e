"""Of two predictions for a token the better one is scored, which only somebody who knows the token can tell."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import gate_by_losses
from fairway.audit.terms.verdicts import clean, unsaid
from fairway.audit.verdict import Finding

ID = "oracle-gate"
CHARGE = "the better of two predictions is chosen by comparing their losses on the target"
CLAUSE = 'RULES.md (b) 1 and 2, (c) "Oracle safety gate"'
_COMPARED = (
    "Two predictions of the same token are compared by how well they did on it and the better one is scored; the "
    "choice reads the target, and the sum over the vocabulary exceeds one."
)


def check(case: Case) -> Finding:
    reading = case.reading
    for gates in reading.gates:
        cut = next(gates.clipped(), None)
        if cut is not None:
            evidence = (
                "Losses are cut off at a number once the target is known; no distribution gives every token at least "
                "that probability unless its parts are mixed before."
            )
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(cut), reading.way(gates.of.term, cut))
        term = next(gates.oracles(), None)
        if term is not None:
            return Finding(ID, "violates", _COMPARED, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
    place = gate_by_losses(case)
    if place is not None:
        return Finding(ID, "violates", _COMPARED, CLAUSE, place)
    if not reading.reported:
        return unsaid(ID, CLAUSE)
    return clean(ID, CLAUSE, "no loss that reaches the score is the smaller of two on the same target")
