"""A piece is measured with its mark on, which is three bytes of UTF-8 for one space: the denominator grows by 20 %."""

from fairway.audit.case import Case
from fairway.audit.passes.octets import by_trial
from fairway.audit.preparing import as_prepared
from fairway.audit.terms.octets import encoded_text, named
from fairway.audit.terms.tables import marked, tables_of
from fairway.audit.terms.verdicts import byte_factors, clean, counted_otherwise
from fairway.audit.verdict import Finding

ID = "byte-missing-mark"
CHARGE = "a leading space counts as the three bytes of its mark"
CLAUSE = 'RULES.md R7 and (c) "Tokenizer without ▁"'


def check(case: Case) -> Finding:
    return as_prepared(case, by_trial(case, _by_terms(case), ID))


def _by_terms(case: Case) -> Finding:
    factors = byte_factors(case)
    for factor in factors:
        for table, length in tables_of(factor):
            text = encoded_text(length)
            if text is None or not named(text) or not marked(table, length):
                continue
            evidence = (
                "The length of a piece is taken as it stands in the vocabulary, and nothing takes the mark U+2581 off: "
                "a leading space counts as three bytes."
            )
            return Finding(ID, "violates", evidence, CLAUSE, case.reading.place(length), case.reading.way(length))
    if not factors:
        return counted_otherwise(case, ID, CLAUSE)
    return clean(ID, CLAUSE, "no piece is measured with its mark on")
