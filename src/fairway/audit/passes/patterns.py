"""Where the pattern of a read is written: in the run command, or as a text of the script."""

import ast
from collections.abc import Iterator, Sequence

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


def names_given(case: Case, ways: Sequence[Sequence[Place]]) -> set[str]:
    """The names, and names of fields, that are given what these ways lead to, outermost: what a helper calls it by is
    a name for much else."""
    given: dict[Place, set[str]] = {}
    for script in case.script.all():
        for node in nodes(script.tree):
            if isinstance(node, ast.Assign):
                names = {last_name(each) for each in node.targets if isinstance(each, (ast.Name, ast.Attribute))}
                given.setdefault(Place(script.path, script.line(node.lineno)), set()).update(names)
    return {name for way in ways for name in next((given[place] for place in way if given.get(place)), ())}


_SIZES = frozenset(("numel", "size", "shape", "ndim", "dtype", "device"))  # ask how much there is, and take none of it


def naming(case: Case, names: set[str]) -> Iterator[Place]:
    """Where a call is handed one of these names, or a part of what has it is taken or asked for."""
    for script in case.script.all():
        sized = {
            id(each.value) for each in nodes(script.tree) if isinstance(each, ast.Attribute) and each.attr in _SIZES
        }
        for node in nodes(script.tree):
            said = (part for each in _held(node) for part in nodes(each) if isinstance(part, (ast.Name, ast.Attribute)))
            if any(last_name(part) in names and id(part) not in sized for part in said):
                yield Place(script.path, script.line(getattr(node, "lineno", 0)))


def _held(node: ast.AST) -> list[ast.expr]:
    """What a call is handed, an index or a method is asked of, a field is given."""
    if isinstance(node, ast.Call) and last_name(node.func) != "len":
        return [*node.args, *(each.value for each in node.keywords)]
    if isinstance(node, ast.Subscript):
        return [node.value]
    if (isinstance(node, ast.Attribute) and node.attr not in _SIZES) or (
        isinstance(node, ast.Assign) and _is_put(node)
    ):
        return [node.value]
    return []


def put_in_place(case: Case) -> set[int]:
    """The lines that give a field, or a part of something, a value: `loader.tokens = cat((val, loader.tokens))`."""
    return {
        case.body.line(node.lineno) for node in nodes(case.body.tree) if isinstance(node, ast.Assign) and _is_put(node)
    }


def _is_put(node: ast.Assign) -> bool:
    targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
    return any(isinstance(each, (ast.Attribute, ast.Subscript)) for each in targets)
