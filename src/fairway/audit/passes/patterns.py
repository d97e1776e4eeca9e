"""Where the pattern of a read is written: in the run command, or as a text of the script."""

import ast

from fairway.audit.case import Case
from fairway.audit.reading.tree import nodes
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
