"""The score divides by a number of bytes that nobody counted: tokens times 4.3, or a total written into the script."""

from fairway.audit.case import Case
from fairway.audit.passes.octets import by_trial
from fairway.audit.terms.octets import counts_bytes
from fairway.audit.terms.report import is_assumed, used_at
from fairway.audit.terms.verdicts import byte_factors, clean, unseen
from fairway.audit.verdict import Finding

ID = "byte-constant"
CHARGE = "bytes are a constant, not a count"
CLAUSE = 'RULES.md R7 and (c) "Hard-coded bytes/token"'


# The validation split: canonical, and as the case transform's sidecars sum it (RULES.md R7).
TOTALS = (151_080_891, 151_074_309)


def check(case: Case) -> Finding:
    return by_trial(case, _by_terms(case), ID)


def _by_terms(case: Case) -> Finding:
    seen = False
    for number, fraction in case.reading.fractions:
        if any(counts_bytes(term) for term in (*fraction.down, *fraction.up) if not case.reading.is_loss(term)):
            seen = True
            continue
        constant = is_assumed(fraction)
        if constant is None:
            continue
        place = case.reading.place(used_at(number.term, constant))
        if constant.value in TOTALS:
            seen = True
        elif isinstance(constant.value, (int, float)) and constant.value > 1e6:
            evidence = (
                f"The score divides by {constant.value:g} bytes, a number in the script that nothing counts or checks."
            )
            return Finding(ID, "suspect", evidence, CLAUSE, place, case.reading.way(constant))
        else:
            evidence = (
                f"The score assumes {constant.value:g} bytes for a token instead of counting the bytes of the text."
            )
            return Finding(ID, "violates", evidence, CLAUSE, place, case.reading.way(constant))
    seen = seen or bool(byte_factors(case))
    return clean(ID, CLAUSE, "bytes are counted from the text or the pieces") if seen else unseen(case, ID, CLAUSE)
