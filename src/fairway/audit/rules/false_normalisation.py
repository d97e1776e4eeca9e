"""Counts for all tokens are gathered and divided by something that is not their sum: the rows do not sum to one."""

from fairway.audit.case import Case
from fairway.audit.terms import ageing, mixtures, normalisers, rows
from fairway.audit.terms.gates import Gates
from fairway.audit.terms.verdicts import clean, unsaid
from fairway.audit.verdict import Finding
from fairway.audit.weighing import PIECES, excess, is_sound

ID = "false-normalisation"
CHARGE = "a distribution is divided by something else than its sum"
CLAUSE = 'RULES.md (b) 2, (c) "Fake normalisation"'
APART = "weighing"

_WAYS = (
    (
        rows.wrongly_divided,
        "Hashed counts of all tokens are divided by the count of their context instead of by their own sum; with "
        "colliding keys the two differ and the probabilities sum to more than one.",
    ),
    (rows.undivided, "A row of counts that is mixed in is divided by something else than its sum."),
    (mixtures.unbalanced, "The parts of a mixture are added with weights that do not sum to one."),
    (
        rows.added_on_top,
        "A second distribution is added to one that is whole already and gives up no share for it; nothing divides the "
        "sum by what it comes to.",
    ),
    (
        Gates.lifted,
        "A target's probability is lifted to a floor that no other token gives anything up for: with it for every "
        "token the sum exceeds one.",
    ),
    (
        mixtures.unpaid_bonus,
        "A right hint is given a bonus, and the share that it takes from all other tokens is never taken off.",
    ),
    (
        mixtures.underpaid_bonus,
        "A right hint's logarithm is raised by a bonus, and the sum grows by exp(bonus) - 1 times the hint's "
        "probability: less is taken off.",
    ),
    (
        rows.counted_otherwise,
        "A row of counts is divided by a count that is kept under another key than the row: where contexts meet in "
        "the one and not in the other, the probabilities sum to more than one.",
    ),
    (
        ageing.aged_otherwise,
        "A row of counts is divided by a count that ages otherwise than the row: the one is multiplied by a number "
        "now and then, the other by another one or by none, and the probabilities do not sum to one.",
    ),
    (
        rows.greatest,
        "Of several distributions the larger value is taken for every token: the sum over the vocabulary exceeds one.",
    ),
    (
        mixtures.unpaid_floor,
        "Tokens outside a short list are all given the same number, and the loss within the list, whole already, "
        "gives nothing up for it: the sum over the vocabulary exceeds one.",
    ),
    (
        normalisers.partial,
        "A row is divided by what some of its places sum to: all of them together sum to more than one.",
    ),
    (
        normalisers.capped,
        "A row of counts is divided by its sum, and by no more than a limit: larger rows sum to more than one.",
    ),
    (
        normalisers.peaked,
        "A row is divided by the largest of its numbers and not by their sum: its probabilities sum to more than one.",
    ),
    (
        normalisers.floored,
        "Counts and a share of another distribution are added and divided by the larger of the counts' sum and that "
        "share, not by both: the sum exceeds one.",
    ),
    (
        normalisers.smoothed,
        "Something is added to every count of a row, and the row is divided by the sum of the counts without it: the "
        "probabilities sum to more than one.",
    ),
    (
        normalisers.bent,
        "A row that sums to one is raised to a power, and nothing divides it by its new sum.",
    ),
    (
        normalisers.stretched,
        "Logarithms of probabilities are multiplied by a number after the softmax, and nothing divides by the new sum.",
    ),
    (
        normalisers.shifted,
        "Something is added to logarithms of probabilities after the softmax, and nothing divides by the new sum.",
    ),
    (
        normalisers.of_others,
        "The logarithm of the sum is that of other logits, or of some of them, than the target's is taken from: the "
        "probabilities do not sum to one.",
    ),
)


def _weighed(case: Case) -> Finding | None:
    """Of a form that nobody foresaw, the sum itself. What a table already holds of the token that is exchanged says
    nothing of its sums: that prices hang on what follows is another rule's matter."""
    weight = excess(case)
    if weight is None or case.foresees:
        return None
    evidence = (
        f"Worked out with a made-up model over a short text: what the script says of all {PIECES} tokens that may "
        f"stand at one place adds up to {weight.total:.4f}."
    )
    return Finding(ID, "violates", evidence, CLAUSE, case.place(weight.line))


def check(case: Case) -> Finding:
    reading = case.reading
    for gates in reading.gates:
        for way_of, evidence in _WAYS:
            term = next(way_of(gates), None)
            if term is not None and not (way_of is Gates.lifted and is_sound(case)):
                way = reading.way(gates.of.term, term)
                return Finding(ID, "violates", evidence, CLAUSE, reading.place(term), way)
    if not reading.reported:
        return unsaid(ID, CLAUSE)
    found = _weighed(case)
    if found is not None:
        return found
    return clean(ID, CLAUSE, "rows of counts in scored losses are divided by their own sums; weights sum to one")
