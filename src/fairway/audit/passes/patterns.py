"""Where the pattern of a read is written: in the run command, or as a text of the script."""

import ast
from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.flow.names import side_of
from fairway.audit.reading.tree import last_name, nodes
from fairway.audit.verdict import Place


def pattern_at(case: Case, pattern: str) -> Place | None:
    """The line that says `pattern`, or its last part; None where none or several do."""
    for command in case.settings.commands:
        if pattern in (*command.environment.values(), *command.arguments.values()):
            return Place(command.file, command.line)
    name = pattern.rsplit("/", 1)[-1]
    places = {
        Place(script.path, script.line(node.lineno))
        for script in case.script.all()
        for node in nodes(script.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.rsplit("/", 1)[-1] == name
    }
    return places.pop() if len(places) == 1 else None


_TELLING = frozenset(("print", "log", "log0", "say", "info", "write", "warning", "debug"))


def handed_at(case: Case, reads: set[Place]) -> Place | None:
    """The one line besides the evaluation's reads that hands on the setting which those name the validation files by:
    `Loader(args.val_files)`. reads: the lines of the evaluation's reads. None where none or several do."""
    handed = list(_handed(case))
    words = {word for place, word in handed if place in reads and side_of(word) == "val"}
    others = {place for place, word in handed if word in words} - reads
    return others.pop() if len(others) == 1 else None


def _handed(case: Case) -> Iterator[tuple[Place, str]]:
    """Every name that the script hands to a call which tells nobody of it, and where."""
    for script in case.script.all():
        for call in nodes(script.tree):
            if not isinstance(call, ast.Call) or last_name(call.func) in _TELLING:
                continue
            for arg in (*call.args, *(each.value for each in call.keywords)):
                for node in nodes(arg):
                    if isinstance(node, (ast.Name, ast.Attribute)):
                        word = node.id if isinstance(node, ast.Name) else node.attr
                        yield Place(script.path, script.line(node.lineno)), word
