"""Accepted departures: where merged records depart from the strict text of the rules (RULES.md (b), last list).

Each has a name. A rule that finds one says so in its verdict, which stays clean; with --strict it is a violation.
"""

from collections.abc import Sequence
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
        "documents-by-length",
        "adaptation-order-race",
        "documents scored and learned from in the order of their lengths, which only the whole text tells",
        "#77, #1530 and their heirs, merged",
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


@dataclass(frozen=True)
class Made:
    """A departure that a submission makes: its name, a sentence with its evidence, and where it is."""

    name: str
    evidence: str
    place: Place | None = None
    way: tuple[Step, ...] = ()


def departures(case: Case, clause: str, made: Sequence[Made]) -> Finding:
    """The verdict on what is accepted under one rule: clean under the names of all of them, a violation where the
    audit is strict. The place is the first one's."""
    first = made[0]
    rule = DEPARTURES[first.name].rule
    way = (*first.way, *(Step(each.place, each.evidence) for each in made[1:] if each.place is not None))
    if case.strict:
        return Finding(rule, "violates", " ".join(each.evidence for each in made), clause, first.place, way)
    accepted = [f"{each.evidence} Accepted so far ({DEPARTURES[each.name].precedent})." for each in made]
    names = ", ".join(each.name for each in made)
    return Finding(rule, "clean", " ".join(accepted), clause, first.place, way, exemption=names)


def departure(
    case: Case,
    name: str,
    clause: str,
    evidence: str,
    place: Place | None = None,
    way: tuple[Step, ...] = (),
) -> Finding:
    """The verdict on an accepted departure: clean under its name, a violation where the audit is strict."""
    return departures(case, clause, [Made(name, evidence, place, way)])
