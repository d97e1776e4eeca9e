"""A token's probability is spread over its bytes and mixed with a byte model: a distribution of neither."""

from fairway.audit.case import Case
from fairway.audit.terms.mixtures import spread_over_bytes
from fairway.audit.terms.verdicts import clean, unsaid
from fairway.audit.verdict import Finding

ID = "byte-mixture"
CHARGE = "a token's probability is spread over its bytes and mixed with a byte model"
CLAUSE = 'RULES.md (b) 2, (c) "Byte PPM mixed with spread token p"'


def check(case: Case) -> Finding:
    reading = case.reading
    for gates in reading.gates:
        term = next(spread_over_bytes(gates), None)
        if term is not None:
            evidence = (
                "The probability of the scored token is taken to the power of one over its bytes and mixed byte by "
                "byte; the result is summed over no alphabet, neither of bytes nor of tokens."
            )
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(term), reading.way(gates.of.term, term))
    if not reading.reported:
        return unsaid(ID, CLAUSE)
    return clean(ID, CLAUSE, "no probability of a token is spread over its bytes before it is scored")
