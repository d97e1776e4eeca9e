"""How a preparation is asked for: a script of its own, or a word, a switch, a variable that the entry script knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fairway.audit.case import Case
from fairway.audit.commands import commands_in
from fairway.audit.reading.script import Script
from fairway.audit.reading.tree import nodes
from fairway.audit.settings import Settings, read
from fairway.audit.terms.data import TOKENISERS
from fairway.audit.trial.arguments import Parser
from fairway.audit.trial.core import Core
from fairway.audit.trial.files import Path
from fairway.audit.trial.values import Class, Lib, Obj, Value

_ASKS = re.compile(
    r"-{0,2}(?:(?:data[-_])?prep(?:are)?(?:[-_]\w+)?|(?:build|make|pack)(?:[-_](?:data|shards|tokens|text)\w*)?|tokeni[sz]e|encode)",
    re.IGNORECASE,
)
_WRITES = frozenset(("tofile", "tobytes", "save", "write", "memmap", "savez", "pack"))
_COUNT = re.compile(r"num|count|size|docs|limit|max|seed|workers|procs|shards?|threads|chunk|vocab|^n$|^n_", re.I)
_TRIED = 4


@dataclass(frozen=True)
class Asked:
    """One way to run it. words: behind the script's name; script, settings: what is run."""

    script: Script
    settings: Settings
    words: tuple[str, ...] = ()


def ways(case: Case) -> Iterator[Asked]:
    """Of each script that cuts texts into tokens and writes something: how it would be run for that."""
    submission = case.submission
    texts = [("README.md", submission.readme), ("run.sh", submission.command)]
    imported = {script.path for script in submission.entry.all()}
    for script in submission.scripts:
        if script.tree is None or not _prepares([each for each in script.all() if each.tree is not None]):
            continue
        if script.path != submission.entry.path:
            if script.path not in imported:
                yield Asked(script, read(script.path, [each for each in texts if each[1]]))
            continue
        said = [each for path, text in texts for each in commands_in(path, text, script.path) if each.task]
        for command in said[:_TRIED]:
            settings = Settings(command.environment, command.arguments, (command,), submission.tables)
            yield Asked(script, settings, (command.task,))
        told = {each.task for each in said}
        for word in [each for each in _words(script) if each not in told][:_TRIED]:
            yield _asked(script, case.settings, word)


def _asked(script: Script, settings: Settings, word: str) -> Asked:
    if word.isupper():
        return Asked(script, replace(settings, environment={**settings.environment, word: "1"}))
    if word.startswith("--"):
        option = word.lstrip("-").replace("-", "_")
        return Asked(script, replace(settings, arguments={**settings.arguments, option: True}), (word,))
    return Asked(script, settings, (word,))


def _prepares(scripts: list[Script]) -> bool:
    named = {node.attr for script in scripts for node in nodes(script.tree) if isinstance(node, ast.Attribute)}
    pieces = any("sentencepiece" in script.text for script in scripts)
    return pieces and bool(named & TOKENISERS) and bool(named & _WRITES)


def _words(script: Script) -> list[str]:
    """Texts of the script that would ask it to prepare its data."""
    found: dict[str, None] = {}
    for node in nodes(script.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _ASKS.fullmatch(node.value):
            found[node.value] = None
    return sorted(found, key=lambda word: (not re.search("prep", word, re.I), word.isupper()))


class Options(Parser):
    """argparse.ArgumentParser: what must be given is made up, and the sub-command is the one asked for."""

    def __init__(self, machine: Core, words: tuple[str, ...], parents: Value = ()) -> None:
        super().__init__(machine, parents)
        self.words = words
        self.below: dict[str, Options] = {}
        self.named = "command"

    def add_argument(self, *names: Value, **kwargs: Value) -> None:
        plain = [str(each) for each in names if isinstance(each, str)]
        super().add_argument(*names, **kwargs)
        if not plain:
            return
        option = max(plain, key=len)
        name = kwargs.get("dest") or option.lstrip("-").replace("-", "_")
        if isinstance(self.values.get(name), str) and getattr(kwargs.get("type"), "name", "") == "Path":
            self.values[name] = Path(self.values[name])
        choices = kwargs.get("choices")
        word = next((each for each in self.words if isinstance(choices, (list, tuple)) and each in choices), None)
        if word is not None:
            self.values[name] = word
        elif isinstance(choices, (list, tuple)) and choices and not option.startswith("-"):
            self.values[name] = choices[0]
        elif self.values.get(name) is None and (kwargs.get("required") is True or not option.startswith("-")):
            given: Value = _made_up(name, kwargs)
            self.values[name] = [given] if kwargs.get("nargs") in ("+", "*") else given

    def add_subparsers(self, *_: Value, dest: Value = "command", **__: Value) -> Options:
        self.named = dest if isinstance(dest, str) else "command"
        return self

    def add_parser(self, name: Value = "", *_: Value, parents: Value = (), **__: Value) -> Options:
        made = Options(self.machine, self.words, parents)
        self.below[str(name)] = made
        return made

    def parse_args(self, *_: Value, **__: Value) -> Obj:
        values = dict(self.values)
        word = next((each for each in self.words if each in self.below), None)
        if word is not None:
            values.update(self.below[word].values)
            values[self.named] = word
        elif self.below:
            values[self.named] = None
        return Obj(Class("Namespace", [], {}), values)


def _made_up(name: str, kwargs: dict[str, Any]) -> Value:
    kind = kwargs.get("type")
    if isinstance(kind, Lib) and kind.name in ("int", "float"):
        return 1_000 if _COUNT.search(name) else 1
    if isinstance(kind, Lib) and kind.name == "Path":
        return Path(f"made/{name}")
    return f"made/{name}"


__all__ = ["Asked", "Options", "ways"]
