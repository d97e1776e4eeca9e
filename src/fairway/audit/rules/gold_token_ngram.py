"""A hashed n-gram cache is asked for the scored token alone: with collisions the ratios sum to hundreds (#886: 277)."""

from fairway.audit.case import Case
from fairway.audit.terms.mixtures import gold_ratios
from fairway.audit.terms.verdicts import clean, unsaid
from fairway.audit.verdict import Finding

ID = "gold-token-ngram"
CHARGE = "hashed n-gram counts are read at the target alone and never summed over the vocabulary"
CLAUSE = 'RULES.md (b) 2, (c) "Hashed n-gram, gold token only"'


def check(case: Case) -> Finding:
    reading = case.reading
    for gates in reading.gates:
        term = next(gold_ratios(gates), None)
        if term is not None:
            evidence = (
                "A probability is the ratio of two hashed counts, the upper keyed by the context and the target, and "
                "no sum over the vocabulary is taken: colliding keys give the tokens more than one in all."
            )
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
    if not reading.reported:
        return unsaid(ID, CLAUSE)
    return clean(
        ID, CLAUSE, "no hashed count keyed by the target is divided by one keyed by its context in a scored loss"
    )
