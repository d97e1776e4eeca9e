"""The space that a piece's mark stands for is counted in the table and again in the loop: 17 % too many bytes."""

from fairway.audit.case import Case
from fairway.audit.passes.octets import by_trial
from fairway.audit.preparing import as_prepared
from fairway.audit.terms.sidecars import added_to_sidecar
from fairway.audit.terms.spaces import SpaceCount, is_conditional
from fairway.audit.terms.verdicts import byte_factors, clean, counted_otherwise
from fairway.audit.verdict import Finding

ID = "byte-double-space"
CHARGE = "the byte of a leading space is counted twice"
CLAUSE = 'RULES.md R7 and (c) "Byte double count"'


def check(case: Case) -> Finding:
    return as_prepared(case, by_trial(case, _by_terms(case), ID))


def _by_terms(case: Case) -> Finding:
    factors = byte_factors(case)
    for factor in factors:
        found = SpaceCount().of(factor)
        if found.count >= 2:
            terms = sorted(found.added.values(), key=lambda term: (term.file, term.line))
            first, last = case.reading.place(terms[0]), case.reading.place(terms[-1])
            whole = [term for term in terms if not is_conditional(term)]
            at = case.reading.place(whole[-1]) if len(whole) == 1 else last
            where = (
                f"at line {first.line} and again at line {last.line}"
                if first != last
                else f"twice at line {first.line}"
            )
            evidence = (
                f"A token that begins with a space has that byte counted {where}, so the denominator is too large."
            )
            return Finding(ID, "violates", evidence, CLAUSE, at, case.reading.way(*terms[::-1]))
        side = next((side for side in added_to_sidecar(factor) if SpaceCount().of(side).count > 0), None)
        if side is not None:
            evidence = "To the bytes of a sidecar, which has every space of the text, a leading space is added again."
            return Finding(ID, "violates", evidence, CLAUSE, case.reading.place(side), case.reading.way(side))
    if not factors:
        return counted_otherwise(case, ID, CLAUSE)
    return clean(ID, CLAUSE, "the byte of a leading space is counted at most once for each token")
