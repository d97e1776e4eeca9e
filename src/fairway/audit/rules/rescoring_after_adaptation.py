"""Tokens are scored a second time, after the model adapted to them."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import passes_on
from fairway.audit.verdict import Finding

ID = "rescoring-after-adaptation"
CHARGE = "tokens are scored a second time, after the model adapted to them"
CLAUSE = 'RULES.md (b) conditions 3 and 4; (c) "TTT then re-score"'


def check(case: Case) -> Finding:
    clean = "Every validation loss in the score was booked before anything learned from its token."
    return passes_on(case, ID, CLAUSE, clean)
