"""A byte piece (<0xE2>) is one byte; measured as a text it is three (U+FFFD) or six."""

from fairway.audit.case import Case
from fairway.audit.passes.octets import by_trial
from fairway.audit.preparing import as_prepared
from fairway.audit.terms.octets import encoded_text, piece_of
from fairway.audit.terms.tables import has_byte_test, tables_of, text_for_a_byte, text_on_the_way, three_for_a_byte
from fairway.audit.terms.term import Term, any_below
from fairway.audit.terms.verdicts import byte_factors, clean, counted_otherwise
from fairway.audit.verdict import Finding

ID = "byte-fallback-three"
CHARGE = "a byte-fallback token counts as three bytes"
CLAUSE = 'RULES.md R7 and (c) "Fallback bytes counted as 3"'


def check(case: Case) -> Finding:
    return as_prepared(case, by_trial(case, _by_terms(case), ID))


def _by_terms(case: Case) -> Finding:
    factors = byte_factors(case)
    for factor in factors:
        for table, length in tables_of(factor):
            wrong = three_for_a_byte(table)
            if wrong is not None:
                evidence = f"A byte piece is one byte, and here it counts as {wrong.value}."
                return Finding(ID, "violates", evidence, CLAUSE, case.reading.place(wrong), case.reading.way(wrong))
            spelt = text_for_a_byte(table) or text_on_the_way(table)
            if spelt is not None:
                evidence = "A byte piece is one byte, and here its text is measured: U+FFFD has three, its name six."
                return Finding(ID, "violates", evidence, CLAUSE, case.reading.place(spelt), case.reading.way(spelt))
            text = encoded_text(length)
            if text is not None and any_below(text, _replaces):
                evidence = "A byte piece is decoded with errors replaced and measured: U+FFFD has three bytes for one."
                return Finding(ID, "violates", evidence, CLAUSE, case.reading.place(length), case.reading.way(length))
            if text is None or piece_of(text) is None or has_byte_test(table):
                continue
            evidence = (
                "Each token is measured by the text of its piece, and nothing tells byte pieces apart: one byte counts "
                "as the three of U+FFFD, or as the characters of its name."
            )
            return Finding(ID, "violates", evidence, CLAUSE, case.reading.place(length), case.reading.way(length))
    if not factors:
        return counted_otherwise(case, ID, CLAUSE)
    return clean(ID, CLAUSE, "byte pieces count as one byte, or bytes are not counted by pieces")


def _replaces(term: Term) -> bool:
    """bytes.decode("utf-8", "replace")."""
    return term.called in ("decode", "str") and any(part.constant() in ("replace", "ignore") for part in term.parts)
