"""Quantisation is calibrated on validation tokens."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import verdict_on
from fairway.audit.verdict import Finding

ID = "calibration-on-validation"
CHARGE = "quantisation is calibrated on validation tokens"
CLAUSE = 'RULES.md (b) condition 1, R5; (c) "GPTQ on val"'


def check(case: Case) -> Finding:
    return verdict_on(case, ID, CLAUSE, "The weights hang on no activations of validation tokens.")
