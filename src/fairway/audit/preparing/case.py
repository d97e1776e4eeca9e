"""The preparations of a submission, and what rules are told of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fairway.audit.case import Case
from fairway.audit.preparing.asking import Asked, ways
from fairway.audit.preparing.judging import Wrong, cuts_of, judged
from fairway.audit.preparing.kept_back import kept_back
from fairway.audit.preparing.machine import prepared
from fairway.audit.verdict import Finding, Place


@dataclass(frozen=True)
class Found:
    """What one way to prepare the data does wrong."""

    asked: Asked
    wrong: Wrong

    @property
    def place(self) -> Place:
        script = self.asked.script
        return Place(script.path, script.line(self.wrong.line))


@dataclass
class Preparations:
    """Of one submission. found: what they do wrong; transformed: whether one writes tokens of a text of other bytes."""

    found: list[Found] = field(default_factory=list)
    transformed: bool = False


def preparations(case: Case) -> Preparations:
    """Every way in which a submission prepares its data, tried."""
    made = Preparations()
    done: set[str] = set()
    for asked in ways(case):
        if asked.script.path in done:
            continue
        machine = prepared(asked)
        if machine.disk.written:
            done.add(asked.script.path)
        cuts = cuts_of(machine)
        made.found += [Found(asked, wrong) for wrong in judged(machine, cuts, case.script.text)]
        kept = kept_back(asked) if machine.disk.written or not asked.words else None
        made.found += [Found(asked, kept)] if kept is not None else []
        made.transformed = made.transformed or any(cut.changed != cut.true for cut in cuts)
    return made


def as_prepared(case: Case, found: Finding) -> Finding:
    """A rule's finding, a violation where a preparation does what the rule names."""
    if found.verdict == "violates":
        return found
    for each in case.preparations.found:
        if each.wrong.rule == found.id:
            return Finding(found.id, "violates", each.wrong.evidence, found.clause, each.place)
    return found


__all__ = ["Found", "Preparations", "as_prepared", "preparations"]
