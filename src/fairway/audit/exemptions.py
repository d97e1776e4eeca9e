"""Accepted departures: where merged records depart from the strict text of the rules (RULES.md (b), last list).

Each has a name. A rule that finds one says so in its verdict, which stays clean; with --strict it is a violation.
"""

from dataclasses import dataclass

from fairway.audit.case import Case
from fairway.audit.verdict import Finding, Place, Step


@dataclass(frozen=True)
class Departure:
    """rule: the rule it is excepted from; what: what is let pass; precedent: where it was."""

    name: str
    rule: str
    what: str
    precedent: str


_KNOWN = (
    Departure(
        "documents-claimed-by-ranks",
        "adaptation-order-race",
        "documents sorted by length and claimed by ranks from a shared counter, each with an adapter of its own",
        "#1530 and its heirs, merged",
    ),
    Departure(
        "phased-adaptation",
        "training-before-scoring",
        "after a number of documents are scored, the model learns from those and goes on with the rest",
        "#1610, #1626, merged",
    ),
    Departure(
        "warm-up-on-validation",
        "training-before-scoring",
        "a compile warm-up that steps on validation tokens with an adapter that is thrown away",
        "#1530, flagged and merged",
    ),
    Departure(
        "small-tail",
        "twice-counted-tokens",
        "the last tokens counted once for each short tail window: 960 or 1,984 of 62 million",
        "#50 and its heirs, merged; fixed in #1394",
    ),
    Departure(
        "self-generated-calibration",
        "calibration-after-cap",
        "calibration text written by the model itself after the training clock has stopped",
        "#1019, merged",
    ),
    Departure(
        "diagnostics-outside-the-clock",
        "eval-over-time",
        "passes that the result does not need, run beside an evaluation that keeps its time",
        "#1868, unsettled",
    ),
    Departure(
        "smear-across-documents",
        "boundary-leak",
        "a gate that adds the embedding of the token before, also at a document's first token",
        "#1667, merged; ruled invalid in #1797",
    ),
)
DEPARTURES = {departure.name: departure for departure in _KNOWN}


def departure(
    case: Case,
    name: str,
    clause: str,
    evidence: str,
    place: Place | None = None,
    way: tuple[Step, ...] = (),
) -> Finding:
    """The verdict on an accepted departure: clean under its name, a violation where the audit is strict."""
    known = DEPARTURES[name]
    if case.strict:
        return Finding(known.rule, "violates", evidence, clause, place, way)
    accepted = f"{evidence} Accepted so far ({known.precedent})."
    return Finding(known.rule, "clean", accepted, clause, place, way, exemption=name)
