"""Settings: which values a script's switches have, and with what certainty a condition holds.

A script of this kind reads a hundred environment variables with defaults; which of its branches ran is decided by the
line that started it. `read` takes that line from the texts of a submission (README, logs, shell files). `Settings`
answers two questions, `environ(name, default)` and `argument(option, default)`; `fold` computes an expression of
constants; `truth` is three-valued. What nobody said and nothing decides is UNKNOWN, never a guess.

    fold(node, leaf)    leaf(expression) -> a value or UNKNOWN; asked first for names, attributes, subscripts, calls
    truth(value)        True, False, or None where the value is not known
"""

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fairway.audit.commands import Command, commands_in

Value = Any
"""A Python constant (number, text, truth value, None, tuple, list, dict, set of those), or UNKNOWN."""


class _Unknown:
    """The value that nothing decides. It has no truth: `truth(UNKNOWN)` is None."""

    def __repr__(self) -> str:
        return "UNKNOWN"

    def __bool__(self) -> bool:
        raise TypeError("UNKNOWN has no truth value: ask truth(value)")


UNKNOWN: Final = _Unknown()

# What the launcher gives to every rank; one script runs as all of them, so no single value holds.
_PER_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"}
_PER_RANK |= {"MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"}


@dataclass(frozen=True)
class Settings:
    """What was said about a script's switches from outside it.

    environment: variable -> its text, or UNKNOWN where the texts disagree; arguments: option (as `val_docs`) -> its
    text, True for a bare flag; commands: the lines they come from; tables: texts of the JSON files beside the script.
    """

    environment: Mapping[str, Value] = field(default_factory=dict)
    arguments: Mapping[str, Value] = field(default_factory=dict)
    commands: tuple[Command, ...] = ()
    tables: Mapping[str, str] = field(default_factory=dict)

    def environ(self, name: Value, default: Value = UNKNOWN) -> Value:
        """os.environ.get(name, default): the run command's text, else the default. What every rank is given
        differently is UNKNOWN."""
        if not isinstance(name, str) or name in _PER_RANK:
            return UNKNOWN
        return self.environment.get(name, default)

    def argument(self, option: str, default: Value = UNKNOWN, kind: Callable[[str], Value] | None = None) -> Value:
        """args.option of argparse: the command line's text (through `kind`, its type), else the default."""
        said = self.arguments.get(option.lstrip("-").replace("-", "_"), default)
        if isinstance(said, str) and said is not default and kind is not None:
            return attempt(kind, said)
        return said


def read(
    script: str,
    texts: Iterable[tuple[str, str]],
    trees: Iterable[ast.Module] = (),
    tables: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of the script with this file name. texts: (path, text) of README, logs, shell files; trees: the
    script's own, whose settings are looked up in the logs; tables: (path -> text) of JSON files. A log is of the run
    itself and wins over a README."""
    from fairway.audit.logged import environment_by_logs  # it folds expressions by this module

    texts = list(texts)
    found = [command for path, text in texts for command in commands_in(path, text, script)]
    logs = [text for path, text in texts if path.lower().endswith((".txt", ".log", ".out"))]
    found = [each for each in found if not each.task] or found  # `train_gpt.py prepare` beside the run itself
    environment = _agreed([command.environment for command in found])
    for variable, said in environment_by_logs(logs, trees).items():
        if said is None:
            environment.pop(variable, None)
        else:
            environment[variable] = said
    return Settings(
        environment=environment,
        arguments=_agreed([command.arguments for command in found]),
        commands=tuple(found),
        tables=tables or {},
    )


def _agreed(said: list[dict[str, Any]]) -> dict[str, Value]:
    """One value for a name that all commands give alike; UNKNOWN for one that they give differently or leave out."""
    names = {name for each in said for name in each}
    values: dict[str, Value] = {}
    for name in names:
        given = {repr(each.get(name)): each.get(name) for each in said}
        value = next(iter(given.values()))
        unsaid = isinstance(value, str) and "$" in value  # a shell variable: its value stands nowhere
        values[name] = UNKNOWN if unsaid or len(given) > 1 else value
    return values


def is_setting(text: str) -> bool:
    """Whether a text is a name and its value: "lr=0.02", "depth: 11"."""
    return re.fullmatch(r"\s*[A-Za-z_][\w.-]*\s*[=:](?!=).*", text) is not None


def truth(value: Value) -> bool | None:
    """Whether a condition holds: True, False, or None where it cannot be told."""
    if value is UNKNOWN:
        return None
    try:
        return bool(value)
    except Exception:
        return None


BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: lambda a, b: a is b or a == b,
    ast.IsNot: lambda a, b: not (a is b or a == b),
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
PURE: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "len": len,
    "min": min,
    "max": max,
    "abs": abs,
    "round": round,
    "tuple": tuple,
    "list": list,
    "set": set,
    "frozenset": frozenset,
    "sorted": sorted,
    "sum": sum,
    "any": any,
    "all": all,
    "divmod": divmod,
}
_TEXT_METHODS = frozenset(
    ("lower", "upper", "strip", "lstrip", "rstrip", "split", "startswith", "endswith", "replace", "get")
)
_LARGEST = 1_000_000  # characters or entries of a folded value; bits of a folded integer


def fold(node: ast.expr, leaf: Callable[[ast.expr], Value]) -> Value:
    """The constant that an expression has, or UNKNOWN. Bounded in depth by the parser, in size by _LARGEST."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript, ast.Call)):
        known = leaf(node)
        if known is not UNKNOWN or isinstance(node, (ast.Name, ast.Attribute)):
            return known
    handler = _HANDLERS.get(type(node))
    return handler(node, leaf) if handler else UNKNOWN


def _binary(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    left, right = fold(node.left, leaf), fold(node.right, leaf)
    if left is UNKNOWN or right is UNKNOWN or type(node.op) not in BINARY or not small(node.op, left, right):
        return UNKNOWN
    return attempt(BINARY[type(node.op)], left, right)


def small(op: ast.operator, left: Value, right: Value) -> bool:
    """Whether a power, a shift or a repetition stays within bounds."""
    if isinstance(op, (ast.Pow, ast.LShift)) and isinstance(left, int) and isinstance(right, int):
        return right < 0 or max(1, left.bit_length()) * right < _LARGEST
    if isinstance(op, ast.Mult):
        sizes = [len(value) for value in (left, right) if isinstance(value, (str, bytes, list, tuple))]
        counts = [value for value in (left, right) if isinstance(value, int)]
        return not sizes or not counts or sizes[0] * counts[0] < _LARGEST
    return True


def _unary(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    value = fold(node.operand, leaf)
    if isinstance(node.op, ast.Not):
        held = truth(value)
        return UNKNOWN if held is None else not held
    if value is UNKNOWN:
        return UNKNOWN
    signs = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}
    return attempt(signs[type(node.op)], value)


def _boolean(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    """`and` is false as soon as one part is, `or` true, whatever the unknown parts are."""
    decisive, unsure = isinstance(node.op, ast.Or), False
    last: Value = UNKNOWN
    for part in node.values:
        last = fold(part, leaf)
        held = truth(last)
        if held is decisive:
            return decisive if unsure else last
        unsure = unsure or held is None
    return UNKNOWN if unsure else last


def _compare(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    values = [fold(part, leaf) for part in (node.left, *node.comparators)]
    held: list[Value] = []
    for left, op, right in zip(values, node.ops, values[1:], strict=False):
        known = left is not UNKNOWN and right is not UNKNOWN
        held.append(attempt(COMPARE[type(op)], left, right) if known else UNKNOWN)
    if any(truth(each) is False for each in held):
        return False
    return UNKNOWN if any(each is UNKNOWN for each in held) else True


def _choice(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    held = truth(fold(node.test, leaf))
    if held is not None:
        return fold(node.body if held else node.orelse, leaf)
    first, second = fold(node.body, leaf), fold(node.orelse, leaf)
    return first if first is not UNKNOWN and first == second else UNKNOWN


def _sequence(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    parts = [fold(part, leaf) for part in node.elts]
    if any(part is UNKNOWN for part in parts):
        return UNKNOWN
    kinds: dict[type[ast.expr], Callable[..., Any]] = {ast.Tuple: tuple, ast.List: list, ast.Set: set}
    return attempt(kinds[type(node)], parts)


def _mapping(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    keys = [UNKNOWN if key is None else fold(key, leaf) for key in node.keys]
    values = [fold(value, leaf) for value in node.values]
    if any(part is UNKNOWN for part in (*keys, *values)):
        return UNKNOWN
    return attempt(lambda: dict(zip(keys, values, strict=True)))


def _subscript(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    if isinstance(node.slice, ast.Slice):
        return UNKNOWN
    value, key = fold(node.value, leaf), fold(node.slice, leaf)
    return UNKNOWN if value is UNKNOWN or key is UNKNOWN else attempt(operator.getitem, value, key)


def _joined(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    parts: list[str] = []
    for part in node.values:
        plain = isinstance(part, ast.Constant) or (part.conversion == -1 and part.format_spec is None)
        value = fold(part.value if isinstance(part, ast.FormattedValue) else part, leaf) if plain else UNKNOWN
        if value is UNKNOWN:
            return UNKNOWN
        parts.append(str(value))
    return "".join(parts)


def _call(node: Any, leaf: Callable[[ast.expr], Value]) -> Value:
    """Conversions, and methods of texts and tables; whatever else `leaf` did not know."""
    if node.keywords:
        return UNKNOWN
    arguments = [fold(argument, leaf) for argument in node.args]
    if any(argument is UNKNOWN for argument in arguments):
        return UNKNOWN
    if isinstance(node.func, ast.Name) and node.func.id in PURE:
        return attempt(PURE[node.func.id], *arguments)
    if isinstance(node.func, ast.Attribute) and node.func.attr in _TEXT_METHODS:
        owner = fold(node.func.value, leaf)
        if isinstance(owner, (str, dict)):
            return attempt(getattr(owner, node.func.attr, UNKNOWN), *arguments)
    return UNKNOWN


def attempt(function: Any, *arguments: Any) -> Value:
    """The function's value; UNKNOWN where it refuses, for then the script itself would have stopped there."""
    try:
        return function(*arguments)
    except Exception:
        return UNKNOWN


_HANDLERS: dict[type[ast.expr], Callable[[Any, Callable[[ast.expr], Value]], Value]] = {
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolean,
    ast.Compare: _compare,
    ast.IfExp: _choice,
    ast.Tuple: _sequence,
    ast.List: _sequence,
    ast.Set: _sequence,
    ast.Dict: _mapping,
    ast.Subscript: _subscript,
    ast.JoinedStr: _joined,
    ast.Call: _call,
}
