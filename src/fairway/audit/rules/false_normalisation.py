"""Counts for all tokens are gathered and divided by something that is not their sum: the rows do not sum to one."""

from fairway.audit.case import Case
from fairway.audit.terms.mixtures import counted_otherwise, unbalanced, undivided, unpaid_bonus, unpaid_floor, wrongly_divided
from fairway.audit.terms.verdicts import clean, unsaid
from fairway.audit.verdict import Finding

ID = "false-normalisation"
CHARGE = "a distribution is divided by something else than its sum"
CLAUSE = 'RULES.md (b) 2, (c) "Fake normalisation"'


def check(case: Case) -> Finding:
    reading = case.reading
    for gates in reading.gates:
        term = next(wrongly_divided(gates), None)
        if term is not None:
            evidence = (
                "Hashed counts of all tokens are divided by the count of their context instead of by their own sum; "
                "with colliding keys the two differ and the probabilities sum to more than one."
            )
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
        term = next(undivided(gates), None)
        if term is not None:
            evidence = "A row of counts that is mixed in is divided by something else than its sum."
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
        term = next(unbalanced(gates), None)
        if term is not None:
            evidence = "The parts of a mixture are added with weights that do not sum to one."
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
        term = next(unpaid_bonus(gates), None)
        if term is not None:
            evidence = (
                "A right hint is given a bonus, and the share that it takes from all other tokens is never taken off."
            )
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
        term = next(counted_otherwise(gates), None)
        if term is not None:
            evidence = (
                "A row of counts is divided by a count that is kept under another key than the row: where contexts "
                "meet in the one and not in the other, the probabilities sum to more than one."
            )
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
        term = next(unpaid_floor(gates), None)
        if term is not None:
            evidence = (
                "Tokens outside a short list are all given the same number, and the loss within the list, whole "
                "already, gives nothing up for it: the sum over the vocabulary exceeds one."
            )
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
    if not reading.reported:
        return unsaid(ID, CLAUSE)
    return clean(ID, CLAUSE, "rows of counts in scored losses are divided by their own sums; weights sum to one")
