"""A vector is optimised on the loss of the positions that it then scores."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import vectors_on
from fairway.audit.verdict import Finding

ID = "slot-on-scored"
CHARGE = "a vector is optimised on the loss of the positions that it then scores"
CLAUSE = 'RULES.md (b) conditions 1 and 3; (c) "SLOT"'


def check(case: Case) -> Finding:
    return vectors_on(case, ID, CLAUSE, "Nothing is optimised on the positions that it scores.")
