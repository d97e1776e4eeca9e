"""The model is trained on validation tokens before it scores them."""

from fairway.audit.case import Case
from fairway.audit.exemptions import departure
from fairway.audit.passes.findings import own_call, verdict_on
from fairway.audit.passes.rehearsals import thrown_away
from fairway.audit.verdict import Finding

ID = "training-before-scoring"
CHARGE = "the model is trained on validation tokens before it scores them"
CLAUSE = 'RULES.md (b) conditions 1 and 3, R5, R6; (c) "Pre-eval TTT", "Pre-quant TTT"'


def check(case: Case) -> Finding:
    found = verdict_on(case, ID, CLAUSE, "Nothing that scores had been trained on the tokens that it scores.")
    warming = thrown_away(case) if found.verdict == "clean" else None
    if warming is None:
        return found
    evidence = (
        f"A step at {warming.place} learns from validation tokens before they are scored; what it learned is thrown "
        "away before the score."
    )
    return departure(case, "warm-up-on-validation", CLAUSE, evidence, own_call(case.trace, warming))
