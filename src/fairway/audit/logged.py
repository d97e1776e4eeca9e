"""What a log says of a run's settings: its printed `ttt_enabled: True`, led back to the variable it was read from."""

import ast
from collections.abc import Iterable, Iterator

from fairway.audit.commands import logged_in
from fairway.audit.reading.tree import nodes
from fairway.audit.settings import UNKNOWN, Value, fold

_READS = ("environ.get", "getenv", "environ.setdefault")


def environment_by_logs(logs: Iterable[str], trees: Iterable[ast.Module]) -> dict[str, str | None]:
    """Variable -> the text that it must have had for its setting to have the value that every log prints; None where
    the default gives that value."""
    found: dict[str, str | None] = {}
    settings = [setting for tree in trees for setting in _settings(tree)]
    printed = logged_in(list(logs), [name for name, _, _ in settings])
    for name, variable, expression in settings:
        value = printed.get(name.lower(), UNKNOWN)
        if value is UNKNOWN:
            continue
        if _agrees(_valued(expression, None), value):
            found[variable] = None
            continue
        texts = (str(value), str(value).lower(), "1", "0", "true", "false")
        text = next((text for text in texts if _agrees(_valued(expression, text), value)), None)
        if text is not None:
            found[variable] = text
    return found


def _settings(tree: ast.Module) -> Iterator[tuple[str, str, ast.expr]]:
    """(name, variable, expression) of every name that is given the value of one environment variable."""
    for node in nodes(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        if len(targets) != 1 or not isinstance(targets[0], (ast.Name, ast.Attribute)) or node.value is None:  # type: ignore[attr-defined]
            continue
        expression: ast.expr = node.value  # type: ignore[attr-defined]
        variables = {variable for part in nodes(expression) if (variable := _variable(part)) is not None}
        if len(variables) == 1:
            name = targets[0].id if isinstance(targets[0], ast.Name) else targets[0].attr
            yield name, variables.pop(), expression


def _variable(node: ast.AST) -> str | None:
    """The variable that os.environ.get("X", ...), os.getenv("X") or os.environ["X"] reads."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(_READS) and node.args:
        first = node.args[0]
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
        first = node.slice
    else:
        return None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def _valued(expression: ast.expr, text: str | None) -> Value:
    """The setting's value where its variable has this text; None: where it is not set."""

    def leaf(node: ast.expr) -> Value:
        if _variable(node) is None:
            return UNKNOWN
        if text is not None:
            return text
        default = node.args[1] if isinstance(node, ast.Call) and len(node.args) > 1 else None
        return fold(default, leaf) if default is not None else UNKNOWN

    return fold(expression, leaf)


def _agrees(one: Value, other: Value) -> bool:
    if one is UNKNOWN or other is UNKNOWN:
        return False
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other) <= 1e-9 * max(abs(one), abs(other))
    return bool(one == other)
