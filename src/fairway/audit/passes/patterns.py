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


def names_given(case: Case, places: set[Place]) -> set[str]:
    """The names, and names of fields, that are given a value in these lines."""
    return {
        last_name(target)
        for script in case.script.all()
        for node in nodes(script.tree)
        if isinstance(node, ast.Assign) and Place(script.path, script.line(node.lineno)) in places
        for target in node.targets
        if isinstance(target, (ast.Name, ast.Attribute))
    }


_SIZES = frozenset(("numel", "size", "shape", "ndim", "dtype", "device"))  # ask how much there is, and take none of it


def naming(case: Case, names: set[str]) -> Iterator[Place]:
    """Where a call is handed one of these names, or a part of what has it is taken or asked for."""
    for script in case.script.all():
        sized = {
            id(each.value) for each in nodes(script.tree) if isinstance(each, ast.Attribute) and each.attr in _SIZES
        }
        for node in nodes(script.tree):
            if isinstance(node, ast.Call) and last_name(node.func) != "len":
                held: list[ast.expr] = [*node.args, *(each.value for each in node.keywords)]
            elif isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr not in _SIZES):
                held = [node.value]
            else:
                continue
            said = (part for each in held for part in nodes(each) if isinstance(part, (ast.Name, ast.Attribute)))
            if any(last_name(part) in names and id(part) not in sized for part in said):
                yield Place(script.path, script.line(node.lineno))


def put_in_place(case: Case) -> set[int]:
    """The lines that give a field, or a part of something, a value: `loader.tokens = cat((val, loader.tokens))`."""
    return {
        case.body.line(node.lineno)
        for node in nodes(case.body.tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    }
