"""A table filled in a first pass over the validation tokens scores them in a second."""

from fairway.audit.case import Case
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.findings import verdict_on
from fairway.audit.verdict import Finding
from fairway.audit.weighing import as_foreseen, excess

ID = "two-pass-cache"
CHARGE = "a table filled in a first pass over the validation tokens scores them in a second"
CLAUSE = 'RULES.md (b) conditions 1 and 4; (c) "Two-pass n-gram rescore"'


def check(case: Case) -> Finding:
    found = verdict_on(case, ID, CLAUSE, "No table holds a validation token before it is scored.")
    found = as_foreseen(case, found)
    return found if found.verdict != "clean" or passes_of(case)[1] else _foreseen(case) or found


def _foreseen(case: Case) -> Finding | None:
    """Where the walk sees no table that knew too much: prices hang on what follows, and add up to more than one."""
    weight = excess(case)
    if weight is None or not case.foresees:
        return None
    evidence = (
        "Where a text goes on otherwise from its middle, prices before it change, and what the script says of all "
        f"tokens that may stand at one place adds up to {weight.total:.4f}: what it looks up held the token already."
    )
    return Finding(ID, "violates", evidence, CLAUSE, case.place(weight.line))
