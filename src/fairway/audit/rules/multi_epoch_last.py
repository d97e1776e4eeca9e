"""Each epoch scores and then trains; the last epoch's losses are reported."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import passes_on
from fairway.audit.verdict import Finding

ID = "multi-epoch-last"
CHARGE = "each epoch scores and then trains; the last epoch's losses are reported"
CLAUSE = 'RULES.md (b) conditions 3 and 4; (c) "Multi-epoch, last epoch reported"'


def check(case: Case) -> Finding:
    return passes_on(
        case, ID, CLAUSE, "No pass over the validation tokens is repeated with what an earlier one learned."
    )
