"""The model is trained on validation tokens before it scores them."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import verdict_on
from fairway.audit.verdict import Finding

ID = "training-before-scoring"
CHARGE = "the model is trained on validation tokens before it scores them"
CLAUSE = 'RULES.md (b) conditions 1 and 3, R5, R6; (c) "Pre-eval TTT", "Pre-quant TTT"'


def check(case: Case) -> Finding:
    return verdict_on(case, ID, CLAUSE, "Nothing that scores had been trained on the tokens that it scores.")
