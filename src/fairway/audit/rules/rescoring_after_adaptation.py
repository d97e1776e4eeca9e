"""Tokens are scored a second time, after the model adapted to them."""

from fairway.audit.case import Case
from fairway.audit.passes.charged import all_of_tables
from fairway.audit.passes.findings import passes_on
from fairway.audit.verdict import Finding
from fairway.audit.weighing import as_foreseen

ID = "rescoring-after-adaptation"
CHARGE = "tokens are scored a second time, after the model adapted to them"
CLAUSE = 'RULES.md (b) conditions 3 and 4; (c) "TTT then re-score"'
APART = "weighing"


def check(case: Case) -> Finding:
    clean = "Every validation loss in the score was booked before anything learned from its token."
    found = passes_on(case, ID, CLAUSE, clean)
    return as_foreseen(case, found) if all_of_tables(case, ID) else found
