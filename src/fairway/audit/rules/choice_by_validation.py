"""An average, a checkpoint or an epoch is chosen by validation loss."""

from fairway.audit.case import Case
from fairway.audit.passes.charged import in_price
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
    priced = found.verdict == "violates" and found.place is not None and in_price(case, found.place)
    return clean(ID, CLAUSE, _OF_THE_PAST) if priced and is_sound(case) else found
