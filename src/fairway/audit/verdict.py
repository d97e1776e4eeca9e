"""What an audit says: a verdict for each rule, with its place and its evidence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

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
    exemption: the accepted departure (its name) that keeps a breach of the strict text from being a violation.
    """

    id: str
    verdict: Verdict
    evidence: str
    clause: str
    place: Place | None = None
    way: tuple[Step, ...] = ()
    exemption: str = ""

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

    def plain(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "rules": [finding.plain() for finding in self.rules],
            "facts": dict(self.facts),
        }
