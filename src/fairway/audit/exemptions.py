"""What an audit makes of an accepted departure (departures.py): a rule that finds one says so in its verdict, which
stays clean; with --strict it is a violation."""

from collections.abc import Sequence
from dataclasses import dataclass

from fairway.audit.case import Case
from fairway.audit.departures import DEPARTURES
from fairway.audit.verdict import Finding, Place, Step


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
    said = " ".join(f"{each.evidence} Accepted so far ({DEPARTURES[each.name].precedent})." for each in made)
    names = ", ".join(each.name for each in made)
    if case.strict:
        return Finding(rule, "violates", f"{said} Strictly a violation: {names}.", clause, first.place, way)
    return Finding(rule, "clean", said, clause, first.place, way, exemption=names)


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
