"""Each epoch scores and then trains; the last epoch's losses are reported."""

from fairway.audit.case import Case
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.findings import verdict_on
from fairway.audit.passes.trials import counts_of, epochs
from fairway.audit.verdict import Finding

ID = "multi-epoch-last"
CHARGE = "each epoch scores and then trains; the last epoch's losses are reported"
CLAUSE = 'RULES.md (b) conditions 3 and 4; (c) "Multi-epoch, last epoch reported"'


def check(case: Case) -> Finding:
    clean = "No pass over the validation tokens is repeated with what an earlier one learned."
    found = verdict_on(case, ID, CLAUSE, clean)
    which, own, _ = passes_of(case)
    counts = counts_of(case, which) if found.verdict == "clean" and not own else None
    shown = epochs(case, which, counts) if counts is not None else None
    return found if shown is None else Finding(ID, "violates", shown[0], CLAUSE, case.place(shown[1]))
