"""An average, a checkpoint or an epoch is chosen by validation loss."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import verdict_on
from fairway.audit.verdict import Finding

ID = "choice-by-validation"
CHARGE = "an average, a checkpoint or an epoch is chosen by validation loss"
CLAUSE = "RULES.md (b) conditions 1 and 4, R5"


def check(case: Case) -> Finding:
    return verdict_on(case, ID, CLAUSE, "No weights are chosen by comparing validation losses.")
