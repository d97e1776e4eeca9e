"""The best of several passes over the same tokens is reported."""

from fairway.audit.case import Case
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.findings import verdict_on
from fairway.audit.passes.trials import best_of, counts_of
from fairway.audit.verdict import Finding

ID = "min-over-passes"
CHARGE = "the best of several passes over the same tokens is reported"
CLAUSE = 'RULES.md (b) conditions 1 and 4; (c) "Min over passes / epochs"'


def check(case: Case) -> Finding:
    found = verdict_on(case, ID, CLAUSE, "The score is not chosen among several passes.")
    which, own, _ = passes_of(case)
    counts = counts_of(case, which) if found.verdict == "clean" and not own else None
    shown = best_of(counts) if counts is not None else None
    return found if shown is None else Finding(ID, "violates", shown[0], CLAUSE, case.place(shown[1]))
