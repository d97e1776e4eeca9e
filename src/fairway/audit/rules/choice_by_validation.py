"""An average, a checkpoint or an epoch is chosen by validation loss."""

from fairway.audit.case import Case
from fairway.audit.passes.findings import verdict_on
from fairway.audit.terms.verdicts import clean
from fairway.audit.verdict import Finding
from fairway.audit.weighing import is_sound

ID = "choice-by-validation"
CHARGE = "an average, a checkpoint or an epoch is chosen by validation loss"
CLAUSE = "RULES.md (b) conditions 1 and 4, R5"
APART = "weighing"
_OF_THE_PAST = (
    "Worked out with a made-up model over a short text: all tokens that may stand at one place come to one, and no "
    "price hangs on what follows, so what is chosen there is chosen by the past."
)


def check(case: Case) -> Finding:
    found = verdict_on(case, ID, CLAUSE, "No weights are chosen by comparing validation losses.")
    return clean(ID, CLAUSE, _OF_THE_PAST) if _prices(case, found) and is_sound(case) else found


def _prices(case: Case, found: Finding) -> bool:
    """Whether what is chosen there goes into the price of a token, and is no model's weights."""
    if found.verdict != "violates" or found.place is None:
        return False
    return any(found.place == case.reading.place(term) for gates in case.reading.gates for term in gates.nodes)
