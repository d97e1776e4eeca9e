"""Tables of settings that a run was given otherwise than they are written: a command or the log of the run says so.

A script may keep its settings in a dict, in the fields of a class or in the options of argparse, and read what differs
from the environment under a name that it puts together ("FL_" + key.upper()), from words of the command line
(exam.stride=32), or from a file. What it ran with is then told by the command, and by the table that its log prints.
`settle` writes these values into the syntax tree in place of the defaults, so that all rules read the script as it ran.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairway.audit.commands import commands_in
from fairway.audit.printed import source_end, table_in
from fairway.audit.reading.tree import nodes

_FEWEST = 6  # entries: a smaller dict, or class, is no table of settings
_HEAD = 400  # lines of a log in which its settings stand
_LINE = re.compile(r"""^\s*['"]?([A-Za-z_]\w*)['"]?\s*[:=]\s*('[^']*'|"[^"]*"|[\w.+/*-]+)\s*,?\s*$""")
_BEGUN = re.compile(r"\b(?:step|it|iter|iteration|update)\b['\"\]]?\s*[:=]?\s*\d", re.IGNORECASE)
_OF_A_RUN = frozenset(
    ("seed", "run", "name", "path", "dir", "file", "out", "log", "logs", "id", "time", "date", "port")
)


@dataclass(frozen=True)
class Site:
    """Where a default is written. table: the class that it is a field of, in small letters, or ""."""

    name: str
    table: str
    constant: ast.Constant


@dataclass(frozen=True)
class Told:
    """A setting whose default is another than what was told. file: the log that says so, "" where a command does;
    line: where the default is written."""

    name: str
    default: Any
    value: Any
    file: str
    line: int


def settle(
    trees: Sequence[ast.Module], script: str, texts: Iterable[tuple[str, str]], logs: Mapping[str, str]
) -> tuple[Told, ...]:
    """Writes what commands and logs say into the tables of settings of the trees. script: the file name of the entry;
    texts: (path, text) of README and shell files; logs: text by path. Where two commands or two logs disagree, nothing
    is said."""
    sites = [site for tree in trees for site in _sites(tree)]
    if not sites:
        return ()
    called = {name: [site for site in sites if site.name == name] for name in {site.name for site in sites}}
    owners = dict(pair for tree in trees for pair in _owners(tree))
    commanded, (path, logged) = _commanded(trees, script, texts, called), _logged(logs)
    told = []
    for name, value, file in [
        *((*each, "") for each in commanded.items()),
        *((*each, path) for each in logged.items()),
    ]:
        site = _meant(name, called, owners)
        kept = _as(site.constant.value, value) if site is not None else None
        if site is None or kept is None or kept == site.constant.value or _OF_A_RUN & set(site.name.lower().split("_")):
            continue
        told.append(Told(name, site.constant.value, kept, file, site.constant.lineno))
        site.constant.value = kept
    return tuple(told)


def _sites(tree: ast.Module) -> Iterator[Site]:
    """Every entry of a table of settings that has a constant default."""
    for node in nodes(tree):
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            yield from _of_table([(name, value) for key, value in pairs if (name := _text(key)) is not None], "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
            yield from _of_table([(each.arg, each.value) for each in node.keywords if each.arg], "")
        elif isinstance(node, ast.ClassDef):
            yield from _of_table(list(_fields(node)), node.name.lower())
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            option = next((text for each in node.args if (text := _text(each) or "")[:2] == "--"), None)
            default = next((each.value for each in node.keywords if each.arg == "default"), None)
            if option is not None and isinstance(default, ast.Constant):
                yield Site(option[2:].replace("-", "_"), "", default)


def _text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _of_table(entries: Sequence[tuple[Any, ast.expr]], table: str) -> Iterator[Site]:
    constants = [(name, value) for name, value in entries if isinstance(value, ast.Constant)]
    if len(constants) >= _FEWEST:
        yield from (Site(name, table, value) for name, value in constants)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.value is not None:
            yield each.target.id, each.value
        elif isinstance(each, ast.Assign) and len(each.targets) == 1 and isinstance(each.targets[0], ast.Name):
            yield each.targets[0].id, each.value


def _owners(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(field, class of it): `exam: Exam = ...`, `self.exam = Exam(...)`."""
    for node in nodes(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if isinstance(node.annotation, ast.Name):
                yield node.target.id, node.annotation.id.lower()
        elif (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
        ):
            for target in node.targets:
                if isinstance(target, (ast.Name, ast.Attribute)):
                    yield target.id if isinstance(target, ast.Name) else target.attr, node.value.func.id.lower()


def _meant(name: str, called: Mapping[str, list[Site]], owners: Mapping[str, str]) -> Site | None:
    """The one site that a name, or a dotted name, can mean."""
    part, _, leaf = name.rpartition(".")
    part = part.rpartition(".")[2]
    found = called.get(leaf, [])
    if part:
        found = [site for site in found if site.table in ("", owners.get(part, part.lower()))]
    return found[0] if len(found) == 1 else None


def _as(default: Any, value: Any) -> Any:
    """A value in the default's kind; None where it has another."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return None
    if isinstance(default, bool) or isinstance(value, bool):
        return bool(value) if isinstance(default, bool) and value in (0, 1) else None
    if isinstance(default, (int, float)) and isinstance(value, (int, float)):
        return type(default)(value) if type(default)(value) == value else value
    return value if isinstance(default, str) and isinstance(value, str) else None


def _commanded(
    trees: Sequence[ast.Module], script: str, texts: Iterable[tuple[str, str]], called: Mapping[str, list[Site]]
) -> dict[str, Any]:
    """name -> text of what every command says: by a variable whose name is put together, or by `part.name=text`."""
    commands = [command for path, text in texts for command in commands_in(path, text, script)]
    heads = {head for tree in trees for head in _heads(tree)}
    said = []
    for command in commands:
        variables = {head + name.upper(): name for head in heads for name in called}
        given = {variables[name]: text for name, text in command.environment.items() if name in variables}
        said.append({**given, **command.assigned})
    return _alike(said)


def _heads(tree: ast.Module) -> Iterator[str]:
    """ "FL_" of os.environ.get("FL_" + key.upper()) and of os.environ[f"FL_{key.upper()}"]; "" of key.upper() alone."""
    for node in nodes(tree):
        key: ast.AST | None = None
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("environ.get", "getenv")) and node.args:
            key = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            key = node.slice
        if key is None or ".upper()" not in ast.unparse(key):
            continue
        texts = [each.value for each in nodes(key) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        yield texts[0] if texts else ""


def _logged(logs: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """(the first log with a table, name -> value of what all logs that print one agree on)"""
    tables = {path: table for path, log in sorted(logs.items()) if (table := _table_of(log))}
    return next(iter(tables), ""), _alike(list(tables.values()))


def _table_of(log: str) -> dict[str, Any]:
    """The settings at a log's head: a table on one line, or a line for each."""
    found: dict[str, Any] = {}
    listed: dict[str, Any] = {}
    rows = log.split("\n")
    start = source_end(rows)
    for row in rows[start : start + _HEAD]:
        if _BEGUN.search(row[:200]) or "bpb" in row.lower():
            break  # what is printed from here on are results
        if len(row) < 20_000 and (table := table_in(row)):
            found = found or _dotted(table)
        elif one := _LINE.match(row[:200]):
            listed[one[1]] = one[2].strip("'\"")
    return found or (listed if len(listed) >= _FEWEST else {})


def _dotted(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _dotted(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def _alike(said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all say that say anything: a name with two values, or one that a command leaves out, is not told."""
    names = {name for each in said for name in each}
    return {
        name: said[0][name]
        for name in sorted(names)
        if all(name in each and str(each[name]) == str(said[0][name]) for each in said)
        and "$" not in str(said[0][name])
    }
