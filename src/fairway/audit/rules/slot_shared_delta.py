"""One vector, optimised on the contexts of a batch of overlapping windows, scores them all."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import vectors_on
from fairway.audit.verdict import Finding

ID = "slot-shared-delta"
CHARGE = "one vector, optimised on the contexts of a batch of overlapping windows, scores them all"
CLAUSE = 'RULES.md (b) condition 1; (c) "Context-only SLOT"'


def check(case: Case) -> Finding:
    return vectors_on(case, ID, CLAUSE, "No vector is shared by windows whose contexts hold each other's targets.")
