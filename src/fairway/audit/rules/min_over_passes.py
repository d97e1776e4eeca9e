"""The best of several passes over the same tokens is reported."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import passes_on
from fairway.audit.verdict import Finding

ID = "min-over-passes"
CHARGE = "the best of several passes over the same tokens is reported"
CLAUSE = 'RULES.md (b) conditions 1 and 4; (c) "Min over passes / epochs"'


def check(case: Case) -> Finding:
    return passes_on(case, ID, CLAUSE, "The score is not chosen among several passes.")
