"""A scale of the logits is fitted to, or chosen by, the validation losses."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import verdict_on
from fairway.audit.verdict import Finding

ID = "temperature-from-validation"
CHARGE = "a scale of the logits is fitted to, or chosen by, the validation losses"
CLAUSE = 'RULES.md (b) condition 4; (c) "Temperature on re-scored tokens"'


def check(case: Case) -> Finding:
    return verdict_on(case, ID, CLAUSE, "No scale of the logits hangs on validation losses.")
