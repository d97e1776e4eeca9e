"""The numbers that names of a kind are given: `TTT_CHUNK_TOKENS=32768`, `("CHUNK_TOKENS", 32 * 1024)`, `Table(1 << 20)`
where the class calls its argument `buckets`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial

from fairway.audit.reading.script import Script
from fairway.audit.reading.tree import last_name, nodes
from fairway.audit.settings import UNKNOWN, Settings, Value, attempt, fold
from fairway.audit.trial.limits import Forced

LARGEST = 1 << 30
_DIGITS = len(str(LARGEST))


def numbers(words: str, script: Script, environment: Mapping[str, object]) -> set[int]:
    """words: a pattern of what stands in the names, `chunk|segment`; environment: what a script is given from outside
    it."""
    return {number for _, number in _meant(words, script, environment)}


def _meant(words: str, script: Script, environment: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """The same with the names."""
    meant = re.compile(words, re.IGNORECASE)
    yield from (pair for pair in _given(script.tree) if meant.search(pair[0]))
    told = ((name, value) for name, value in environment.items() if meant.search(name))
    yield from ((name, int(value)) for name, value in told if isinstance(value, str) and value.isdecimal())


def taken(
    script: Script, settings: Settings, words: tuple[str, ...], size: range, value: int, text: int = 0
) -> Iterator[Forced]:
    """Numbers of such a size that a name with one of the words is given, taken for another wherever one stands in a
    name: `rows = int(os.environ.get("TABLE_SIZE", 65_536))`. text: numbers that are no larger than the text are lengths
    of its parts, too, `pred_len = end - start`: they are taken under the names alone that are given them."""
    meant = "|".join(word if len(word) > 1 else f"(?-i:^{word}$)" for word in words)
    for name, number in dict.fromkeys(_meant(meant.replace("_", "[-_]"), script, settings.environment)):
        if number in size:
            own = number <= text
            yield from (Forced(None, number, value, word) for word in ([_as_written(name)] if own else words))


_FILLED = frozenset(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "one_hot"))
_WIDTHS = ("minlength", "num_classes")


@lru_cache(maxsize=8)
def widths(tree: ast.Module | None) -> frozenset[int]:
    """The ids of the nodes that write out how wide the rows of a new table are, `torch.zeros(1024, 1024)`: where the
    vocabulary has as many pieces, the number is that."""
    found: list[ast.expr] = []
    for call in nodes(tree):
        if isinstance(call, ast.Call):
            found += [each.value for each in call.keywords if each.arg in _WIDTHS]
            first = call.args[0] if call.args else None
            sizes = first.elts if isinstance(first, (ast.Tuple, ast.List)) else call.args
            found += sizes[-1:] if last_name(call.func) in _FILLED else []
    return frozenset(id(each) for each in found if isinstance(each, ast.Constant))


def _as_written(name: str) -> str:
    """`--chunk-len` and CHUNK_LEN are read as args.chunk_len."""
    return name.lstrip("-").replace("-", "_").lower() if len(name) > 1 else name


@lru_cache(maxsize=8)
def _given(tree: ast.Module | None) -> tuple[tuple[str, int], ...]:
    """Every name of a script with each number that it is given."""
    handed = _arguments(nodes(tree))
    said = [(name, number) for node in nodes(tree) for name, value in _named(node, handed) for number in _said(value)]
    told = [pair for node in nodes(tree) if isinstance(node, ast.Constant) for pair in _in_text(node.value)]
    return tuple(dict.fromkeys([*said, *told]))


def _in_text(text: object) -> list[tuple[str, int]]:
    """Of a table in a text that `json.loads` reads, at any depth."""
    found: list[tuple[str, int]] = []

    def keep(pairs: list[tuple[str, Value]]) -> None:
        found.extend((name, value) for name, value in pairs if type(value) is int)

    if isinstance(text, str) and text.lstrip()[:1] == "{":
        attempt(partial(json.loads, object_pairs_hook=keep), text)
    return found


def _named(node: ast.AST, handed: Mapping[str, list[str]]) -> Iterator[tuple[str, ast.expr]]:
    """handed: the names of the arguments that functions and classes of the script take."""
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from ((_name(each), value) for each, value in zip(_parts(target), _parts(node.value), strict=False))
    elif isinstance(node, ast.Call):
        texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        yield from ((each.arg or "", each.value) for each in node.keywords)
        yield from zip(handed.get(_name(node.func), ()), node.args, strict=False)
        given = [each.value for each in node.keywords if each.arg == "default"]
        if texts:  # os.environ.get("CHUNK_TOKENS", 65_536), parser.add_argument("--chunk-tokens", default=65_536)
            yield from ((texts[0], value) for value in (*node.args[1:], *given))
    elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
        args = node.args
        last = [*args.posonlyargs, *args.args][-len(args.defaults) or None :] if args.defaults else []
        yield from ((each.arg, value) for each, value in zip(last, args.defaults, strict=False))
        pairs = zip(args.kwonlyargs, args.kw_defaults, strict=False)
        yield from ((each.arg, value) for each, value in pairs if value is not None)
    elif isinstance(node, ast.Dict):
        yield from ((_name(key), value) for key, value in zip(node.keys, node.values, strict=True) if key is not None)
    elif isinstance(node, (ast.Tuple, ast.List)):  # ("chunk_tokens", int, 65_536)
        for name in map(_name, node.elts[:1]):
            yield from ((name, value) for value in node.elts[1:])


def _arguments(said: Iterable[ast.AST]) -> dict[str, list[str]]:
    """The names of the arguments of the script's functions and classes, by their own; of a dataclass its fields."""
    found: dict[str, list[str]] = {}
    for node in said:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, _takes(node))
        elif isinstance(node, ast.ClassDef):
            made = next((each for each in node.body if getattr(each, "name", "") == "__init__"), None)
            fields = [_name(each.target) for each in node.body if isinstance(each, ast.AnnAssign)]
            found[node.name] = _takes(made) if isinstance(made, ast.FunctionDef) else fields
    return found


def _takes(node: ast.FunctionDef) -> list[str]:
    names = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def _name(node: ast.expr) -> str:
    """Of a variable, an attribute, a text; "" of all else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.Subscript):
        return _name(node.slice)
    return str(getattr(node, "id", getattr(node, "attr", "")))


def _parts(node: ast.expr) -> list[ast.expr]:
    """Those of a row, `a, b = 1, 2`."""
    return node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]


def _said(value: ast.expr) -> Iterator[int]:
    """The number that an expression comes to; of a text those in it, `"65_536,4096"`; of what is asked its default."""
    arms = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
    for arm in arms:
        found = fold(arm, _default)
        parts = found.replace("_", "").split(",") if isinstance(found, str) else [found]
        for part in parts:
            number = int(part) if isinstance(part, str) and part.isdecimal() and len(part) < _DIGITS else part
            if type(number) is int and 0 < number <= LARGEST:
                yield number


def _default(node: ast.expr) -> Value:
    """What a call gives where nobody says otherwise: its last argument, `int(os.environ.get("BUCKETS", "4096"))`."""
    if not isinstance(node, ast.Call) or not (node.args or node.keywords):
        return UNKNOWN
    given = next((each.value for each in node.keywords if each.arg == "default"), None)
    found = fold(given if given is not None else node.args[-1], _default) if given or node.args else UNKNOWN
    if _name(node.func) != "int" or not isinstance(found, str):
        return found if isinstance(found, (int, str)) else UNKNOWN
    return int(found) if found.replace("_", "").isdecimal() and len(found) < _DIGITS else UNKNOWN


__all__ = ["LARGEST", "numbers", "taken"]
