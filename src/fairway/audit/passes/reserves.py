"""The part of the training time that a setting keeps back for what comes after the steps, and that is nothing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.flow.events import Event
from fairway.audit.flow.known import CLOCKS
from fairway.audit.passes.late import full_cap
from fairway.audit.reading.tree import last_name, nodes
from fairway.audit.settings import UNKNOWN, Settings, Value, fold
from fairway.audit.verdict import Place

_TIMES = re.compile(r"clock|timer|watch", re.IGNORECASE)
_WITH_RESERVE = 1.25  # a tenth of a training is kept back for what comes after it, an eighth at most
_STEPS = 3  # from a limit in milliseconds, a field or an argument, to its setting
_PLAIN: tuple[type[ast.AST], ...] = (
    *(ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.Name, ast.Attribute, ast.Constant),
    *(ast.BinOp, ast.UnaryOp, ast.IfExp, ast.Compare, ast.BoolOp),
)


def under_one_clock(case: Case, step: Event, clock: Event) -> bool:
    """Whether both stand in one `with clock:`, which goes on until its end."""
    lines = [{place.line for place in each.stack if place.file == case.body.path} for each in (step, clock)]
    return any(
        isinstance(node, ast.With)
        and any(_TIMES.search(last_name(item.context_expr)) for item in node.items)
        and all(any(node.lineno < line <= (node.end_lineno or 0) for line in own) for own in lines)
        for node in nodes(case.body.tree)
    )


def begins_a_time(case: Case, read: Event) -> bool:
    """Whether a clock is read for a name alone, `t0 = time.perf_counter()`: what it says later is the time since."""
    return any(
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and case.place(node.lineno) == read.place
        and last_name(node.value.func) in CLOCKS
        for node in nodes(case.body.tree)
    )


def unreserved(case: Case) -> Place | None:
    """Where a setting stands that is taken off the whole training time and is 0: `cap - reserve`, with a reserve that
    is switched off. None where no setting is taken off it."""
    names = _Names(case)
    for node in names.nodes:
        if not isinstance(getattr(node, "op", None), ast.Sub):
            continue
        if isinstance(node, ast.BinOp):
            whole, part = node.left, node.right
        elif isinstance(node, ast.AugAssign):
            whole, part = node.target, node.value
        else:
            continue
        caps = (value for value, _ in names.settings(whole))
        if any(type(cap) in (int, float) and full_cap(float(cap)) for cap in caps):
            zero = (place for value, place in names.settings(part) if type(value) in (int, float) and value == 0)
            found = next(zero, None)
            if found is not None:
                return found
    return None


def lengthened(case: Case, seconds: float) -> Place | None:
    """Where a setting is added to the whole training time and makes so many seconds of it, `cap + reserve`; None where
    nothing is."""
    names = _Names(case)
    for script in case.script.all():
        for node in nodes(script.tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                caps, more = (
                    {float(value) for value, _ in names.settings(side) if type(value) in (int, float)}
                    for side in (node.left, node.right)
                )
                made = {cap + part for cap in caps if full_cap(cap) for part in more}
                if {seconds, 1000.0 * seconds} & made:
                    return Place(script.path, script.line(node.lineno))
    return None


def set_to(case: Case, line: int, seconds: float) -> Place | None:
    """The setting that a line asks the clock for, which makes these seconds or a little more of it, a reserve taken
    off; in milliseconds as well. None where none does."""
    names = _Names(case)
    asked = (node for node in names.nodes if isinstance(node, ast.Compare | ast.BinOp) and node.lineno == line)
    near = [
        (abs(value / unit - seconds), place)
        for node in asked
        for value, place in names.settings(node)
        if type(value) in (int, float)
        for unit in (1.0, 1000.0)
        if seconds - 1.0 <= value / unit <= _WITH_RESERVE * seconds
    ]
    return min(near, key=lambda each: each[0])[1] if near else None


def commanded(settings: Settings, number: str) -> Place | None:
    """The line of a run command that gives a setting this number, 660 or 660.0."""
    for command in settings.commands:
        for said in (*command.environment.values(), *command.arguments.values()):
            if isinstance(said, str) and _number(said) is not None and _number(said) == _number(number):
                return Place(command.file, command.line)
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class _Names:
    """What names are given, as constants and as other names. given: name -> (constant, where) of settings: fields of a
    class, globals, what is asked of the environment; sources: name -> the names in plain arithmetic that it is given,
    or, for a parameter, in its arguments."""

    def __init__(self, case: Case) -> None:
        self.given: dict[str, list[tuple[Value, Place]]] = {}
        self.sources: dict[str, set[str]] = {}
        self.nodes: list[ast.AST] = []
        parameters: dict[str, list[str]] = {}
        for script in case.script.all():
            if script.tree is None:
                continue
            self.nodes += nodes(script.tree)
            bodies = [
                script.tree.body,
                *(node.body for node in nodes(script.tree) if isinstance(node, ast.ClassDef)),
            ]
            for statement in (each for body in bodies for each in body):
                for name, value in _assigned(statement):
                    known = fold(value, lambda part: _setting(part, case.settings))
                    if known is not UNKNOWN:
                        place = Place(script.path, script.line(value.lineno))
                        self.given.setdefault(name, []).append((known, place))
        for node in self.nodes:
            for name, value in _assigned(node):
                self._add(name, value)
            if isinstance(node, ast.ClassDef):
                parameters[node.name] = _own_parameters(node)
            elif isinstance(node, ast.FunctionDef):
                parameters.setdefault(node.name, [arg.arg for arg in node.args.args])
        for node in self.nodes:
            if isinstance(node, ast.Call):
                for name, arg in zip(parameters.get(last_name(node.func), ()), node.args, strict=False):
                    self._add(name, arg)

    def _add(self, name: str, value: ast.expr) -> None:
        parts = list(nodes(value))
        if all(isinstance(part, _PLAIN) for part in parts):
            self.sources.setdefault(name, set()).update(filter(None, map(last_name, parts)))

    def settings(self, node: ast.expr) -> Iterator[tuple[Value, Place]]:
        """Of the names in an expression, and of what they are made of."""
        names = {name for part in nodes(node) if (name := last_name(part))}
        for _ in range(_STEPS):
            names |= {more for name in names for more in self.sources.get(name, ())}
        return (each for name in sorted(names) for each in self.given.get(name, ()))


def _own_parameters(node: ast.ClassDef) -> list[str]:
    begun = (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
    return next(([arg.arg for arg in each.args.args[1:]] for each in begun), [])


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        yield last_name(node.targets[0]), node.value
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        yield last_name(node.target), _of_field(node.value)


def _of_field(value: ast.expr) -> ast.expr:
    """What a field of a dataclass is by default: X of field(default=X), field(default_factory=lambda: X)."""
    if isinstance(value, ast.Call) and last_name(value.func) == "field":
        for given in value.keywords:
            if given.arg in ("default", "default_factory"):
                return given.value.body if isinstance(given.value, ast.Lambda) else given.value
    return value


def _setting(node: ast.expr, settings: Settings) -> Value:
    """os.environ.get("RESERVE", 0), env_float("RESERVE", 0.0): a name and its default."""
    if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
        return UNKNOWN
    name = node.args[0].value
    default = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else UNKNOWN
    said = settings.environ(name, default) if isinstance(name, str) else UNKNOWN
    number = _number(said) if isinstance(said, str) else None
    return said if number is None else number


__all__ = ["begins_a_time", "commanded", "lengthened", "set_to", "under_one_clock", "unreserved"]
