"""Validation tokens are read by the training."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import verdict_on
from fairway.audit.verdict import Finding

ID = "validation-in-training"
CHARGE = "validation tokens are read by the training"
CLAUSE = 'RULES.md R5; (c) "Val-only training"'


def check(case: Case) -> Finding:
    return verdict_on(case, ID, CLAUSE, "Training reads no validation tokens.")
