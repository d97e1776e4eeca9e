"""What an audit says: a verdict for each rule, with its place and its evidence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fairway.audit.departures import Departure, named

Verdict: TypeAlias = Literal["clean", "violates", "suspect", "cannot tell"]


@dataclass(frozen=True, order=True)
class Place:
    """Where in a submission: a file (relative to its folder; `a.py!inner` for what was unpacked out of it) and a line
    (from 1; 0: the file as a whole)."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Step:
    """One step of the way from the reported number back to its cause."""

    place: Place
    what: str  # "loss of the second pass is added to `total`"


@dataclass(frozen=True)
class Finding:
    """One rule's verdict on one submission.

    evidence: one sentence that a maintainer can paste; way: how the reported number is reached, last step first;
    exemption: the accepted departure (its name) that keeps a breach of the strict text from being a violation; of
    several, their names with commas between them, the first at `place`, the others at the last steps of the way.
    """

    id: str
    verdict: Verdict
    evidence: str
    clause: str
    place: Place | None = None
    way: tuple[Step, ...] = ()
    exemption: str = ""

    def departed(self) -> list[tuple[Departure, Place | None]]:
        """The accepted departures, each with its place."""
        found = list(named(self.exemption))
        others = [step.place for step in self.way[len(self.way) + 1 - len(found) :]] if len(found) > 1 else []
        return list(zip(found, [self.place, *others], strict=False))

    def plain(self) -> dict[str, Any]:
        """For JSON: id, verdict, file, line, evidence, clause, way, exemption."""
        return {
            "id": self.id,
            "verdict": self.verdict,
            "file": self.place.file if self.place else None,
            "line": self.place.line if self.place else None,
            "evidence": self.evidence,
            "clause": self.clause,
            "way": [{"file": s.place.file, "line": s.place.line, "what": s.what} for s in self.way],
            "exemption": self.exemption or None,
        }


@dataclass(frozen=True)
class Report:
    """One submission's verdicts, a Finding for every rule."""

    name: str
    rules: tuple[Finding, ...]
    facts: Mapping[str, Any]  # what was read: scripts, sizes, settings, seconds

    @property
    def verdict(self) -> Verdict:
        """The gravest: violates, then suspect, then cannot tell."""
        found = {finding.verdict for finding in self.rules}
        order: tuple[Verdict, ...] = ("violates", "suspect", "cannot tell")
        return next((verdict for verdict in order if verdict in found), "clean")

    @property
    def accepted(self) -> tuple[Finding, ...]:
        """The findings that an accepted departure keeps from being violations."""
        return tuple(finding for finding in self.rules if finding.exemption)

    def plain(self) -> dict[str, Any]:
        """For JSON: name, verdict, rules, accepted (each departure: name, rule, file, line, what, precedent), facts."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "rules": [finding.plain() for finding in self.rules],
            "accepted": [
                {
                    "name": each.name,
                    "rule": finding.id,
                    "file": place.file if place else None,
                    "line": place.line if place else None,
                    "what": each.what,
                    "precedent": each.precedent,
                }
                for finding in self.accepted
                for each, place in finding.departed()
            ],
            "facts": dict(self.facts),
        }
