"""Whether two logs tell of one configuration: which printed names are settings of the script, which values agree."""

import ast
import re
from collections.abc import Iterable, Iterator

from fairway.audit.commands import Command
from fairway.audit.reading.tree import last_name, nodes

_READS = ("environ.get", "getenv", "environ", "environ.setdefault")
_LITERAL = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop, ast.Tuple, ast.List, ast.Load)


def is_setting(name: str, trees: Iterable[ast.Module]) -> bool:
    """Whether a script sets what it prints under this name from outside (a variable, an option) or once and for all by
    a constant; what it counts, times or computes is a result, and may differ from run to run."""
    given: list[ast.expr] = []
    for tree in trees:
        for node in nodes(tree):
            if _asked(node, name):
                return True
            if isinstance(node, ast.AugAssign) and last_name(node.target) == name:
                return False
        given += _given(tree, name)
    if any(map(_from_outside, given)):
        return True
    if not all(isinstance(part, _LITERAL) for value in given for part in nodes(value)):
        return False
    return len(given) == 1 or any(not _empty(value) for value in given)


def _asked(node: ast.AST, name: str) -> bool:
    """environ.get("NAME"), helper("NAME", default), add_argument("--name")"""
    if not isinstance(node, ast.Call):
        return False
    texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return name.upper() in texts or any(text.lstrip("-").replace("-", "_") == name for text in texts if text[:1] == "-")


def _given(tree: ast.Module, name: str) -> Iterator[ast.expr]:
    """The values that a name, an attribute, a parameter or a key of this name is given anywhere."""
    for node in nodes(tree):
        single = isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and last_name(node.target) == name
        if single or (isinstance(node, ast.Assign) and any(last_name(target) == name for target in node.targets)):
            yield from [node.value] if node.value is not None else []  # type: ignore[attr-defined]
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and any(last_name(part) == name for part in target.elts):
                    yield _part_of(node.value, target, name)
        elif isinstance(node, ast.Dict):
            keys = zip(node.keys, node.values, strict=True)
            yield from (value for key, value in keys if isinstance(key, ast.Constant) and key.value == name)


def _part_of(value: ast.expr, target: ast.Tuple, name: str) -> ast.expr:
    place = next(n for n, part in enumerate(target.elts) if last_name(part) == name)
    same = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
    return value.elts[place] if same else value  # type: ignore[attr-defined]


def _from_outside(value: ast.expr) -> bool:
    return any(
        isinstance(part, (ast.Call, ast.Subscript))
        and ast.unparse(part.func if isinstance(part, ast.Call) else part.value).endswith(_READS)
        for part in nodes(value)
    )


def _empty(value: ast.expr) -> bool:
    """0, "", [], None: what is filled later."""
    return (isinstance(value, ast.Constant) and not value.value) or (
        isinstance(value, (ast.Tuple, ast.List)) and not value.elts
    )


def agree(one: str, other: str) -> bool:
    """Whether two printed values are one: as texts, as truth values, as numbers to the digits of the shorter one."""
    if one.lower() == other.lower():
        return True
    try:
        left, right = float(one), float(other)
    except ValueError:
        truths = {"true": "1", "false": "0", "on": "1", "off": "0", "yes": "1", "no": "0"}
        return truths.get(one.lower(), one) == truths.get(other.lower(), other)
    digits = [len(match[1]) for text in (one, other) if (match := re.search(r"\.(\d+)$", text))]
    rounding = 0.5 * 10.0 ** -min(digits) if len(digits) == 2 else 0.0
    return abs(left - right) <= max(1e-9 * abs(left), rounding if digits and digits[0] != digits[-1] else 0.0)


def commanded(name: str, value: str, commands: Iterable[Command]) -> bool:
    """Whether a command of the submission says that a run has this value."""
    for command in commands:
        for given in (command.environment.get(name.upper()), command.arguments.get(name)):
            if given is not None and agree(str(given), value):
                return True
    return False
