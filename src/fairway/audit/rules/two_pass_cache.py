"""A table filled in a first pass over the validation tokens scores them in a second."""

from fairway.audit.case import Case
from fairway.audit.flow.events import Update
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.findings import verdict_on
from fairway.audit.passes.parted import filled_by_others
from fairway.audit.passes.places import table_filled
from fairway.audit.verdict import Finding
from fairway.audit.weighing import PIECES, as_foreseen, excess

ID = "two-pass-cache"
CHARGE = "a table filled in a first pass over the validation tokens scores them in a second"
CLAUSE = 'RULES.md (b) conditions 1 and 4; (c) "Two-pass n-gram rescore"'
APART = "weighing"


def check(case: Case) -> Finding:
    found = verdict_on(case, ID, CLAUSE, "No table holds a validation token before it is scored.")
    found = found if _of_others(case) else as_foreseen(case, found)
    return found if found.verdict != "clean" or passes_of(case)[1] else _foreseen(case) or found


def _of_others(case: Case) -> bool:
    """Whether each process fills a table with what others score, of which the one that is weighed has nothing."""
    return any(
        fault.kind == ID and isinstance(fault.cause, Update) and filled_by_others(case, fault.score, fault.cause)
        for fault in passes_of(case)[1]
    )


def _foreseen(case: Case) -> Finding | None:
    """Where the walk sees no table that knew too much: prices hang on what follows, or on the token itself where no
    other has come before it."""
    if case.weight is None:  # nothing but a model says them
        return None
    line = table_filled(case) or case.weight.line
    if case.foresees:
        more = f", and all tokens that may stand at one place come to {case.weight.total:.4f}"
        evidence = (
            "Where a text goes on otherwise from its middle, prices before it change"
            f"{more if case.weight.too_much else ''}: what is looked up held the tokens already."
        )
        return Finding(ID, "violates", evidence, CLAUSE, case.place(line))
    gated = any(next(gates.gated(), None) is not None for gates in case.reading.gates)  # another rule's matter
    if gated or excess(case) is not None or case.itself is None:
        return None
    evidence = (
        f"Behind a token that was never met, all of the {PIECES} that may follow come to {case.itself.total:.4f}: what "
        "is looked up for each held it already."
    )
    return Finding(ID, "violates", evidence, CLAUSE, case.place(line))
