"""Validation tokens are read by the training."""

from fairway.audit.case import Case
from fairway.audit.flow.tokens import UNTOLD
from fairway.audit.passes.findings import passes_of, verdict_on
from fairway.audit.verdict import Finding

ID = "validation-in-training"
CHARGE = "validation tokens are read by the training"
CLAUSE = 'RULES.md R5; (c) "Val-only training"'


def check(case: Case) -> Finding:
    found = verdict_on(case, ID, CLAUSE, "Training reads no validation tokens.")
    scored = passes_of(case)[0].data
    learned = {tok.data for update in case.trace.updates for tok in update.learned} - scored
    if found.verdict != "clean" or not all(
        any(kind.startswith(UNTOLD) for kind in kinds) for kinds in (scored, learned)
    ):
        return found
    evidence = "Nothing here tells the files that are trained on from those that are scored."
    return Finding(ID, "cannot tell", evidence, CLAUSE, found.place)
