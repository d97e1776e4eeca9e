"""A table filled in a first pass over the validation tokens scores them in a second."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import verdict_on
from fairway.audit.verdict import Finding
from fairway.audit.weighing import as_foreseen

ID = "two-pass-cache"
CHARGE = "a table filled in a first pass over the validation tokens scores them in a second"
CLAUSE = 'RULES.md (b) conditions 1 and 4; (c) "Two-pass n-gram rescore"'


def check(case: Case) -> Finding:
    found = verdict_on(case, ID, CLAUSE, "No table holds a validation token before it is scored.")
    return as_foreseen(case, found)
