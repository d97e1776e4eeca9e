"""A submission's scripts as programs: what each computes, prints, writes and calls."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fairway.audit.reading.script import Layer, Script
from fairway.audit.settings import Settings, read
from fairway.audit.submission import Submission
from fairway.audit.terms.machine import Machine, Module
from fairway.audit.terms.term import Term
from fairway.audit.terms.things import Event

_COMPANIONS = 8  # scripts beside the entry that are read as programs of their own
_LARGEST = 600_000  # characters of such a script


@dataclass(frozen=True)
class Program:
    """One script read to its end."""

    script: Script
    settings: Settings
    machine: Machine = field(repr=False)

    @property
    def events(self) -> list[Event]:
        return self.machine.events

    @cached_property
    def calls(self) -> dict[str, list[Event]]:
        """Events by the last word of what was called."""
        table: dict[str, list[Event]] = {}
        for event in self.events:
            table.setdefault(event.term.called, []).append(event)
        return table

    def called(self, *words: str) -> list[Event]:
        return sorted((e for word in words for e in self.calls.get(word, ())), key=lambda e: e.order)


@dataclass(frozen=True)
class Programs:
    """The entry, and the scripts that lie beside it and are not part of it (data preparation and the like)."""

    entry: Program
    companions: tuple[Program, ...]

    def all(self) -> tuple[Program, ...]:
        return (self.entry, *self.companions)


def programs(submission: Submission, settings: Settings) -> Programs:
    """Reads the entry and its companions. The entry must have a tree."""
    entry = run(submission.entry, settings, submission)
    inside = {script.path for script in submission.entry.all()}
    companions: list[Program] = []
    for script in submission.scripts:
        if script.path in inside or script.tree is None or len(script.text) > _LARGEST:
            continue
        if len(companions) < _COMPANIONS:
            texts = [("README.md", submission.readme), ("run.sh", submission.command), *submission.logs.items()]
            own = read(script.path, [(path, text) for path, text in texts if text], tables=submission.tables)
            companions.append(run(script, own, submission))
    return Programs(entry, tuple(companions))


def run(script: Script, settings: Settings, submission: Submission) -> Program:
    """Reads one script as a program, with what it executes and the neighbours it imports."""
    others = [each for each in submission.scripts if each.path != script.path]
    others += [layer.script for each in script.all() for layer in each.layers if layer.how == "import"]
    modules = [Module(_stem(each.path), each.path, each.tree) for each in others if each.tree is not None]
    assert script.tree is not None
    machine = Machine(Module(_stem(script.path), script.path, script.tree), modules, settings, _layers(script))
    return Program(script, settings, machine.run())


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".py")


def _layers(script: Script) -> Mapping[tuple[str, int], Layer]:
    """Texts that are executed, by the file and the line that executes them."""
    return {
        (each.path, layer.line): layer for each in script.all() for layer in each.layers if layer.how in ("exec", "run")
    }


def place_of(term: Term) -> tuple[str, int]:
    """File and line of a term, or of the nearest part that has them."""
    waiting = [term]
    while waiting:
        one = waiting.pop(0)
        if one.line:
            return one.file, one.line
        waiting.extend(one.parts[:3])
    return term.file, 0
