"""A second file of weights, that the evaluation reads beside the artifact and whose size nobody asks for."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from fairway.audit.reading import Script
from fairway.audit.reading.tree import last_name, nodes

_SAVES = frozenset(("save", "save_file", "savez", "savez_compressed", "dump", "write_bytes"))
_LOADS = frozenset(("load", "load_file", "read_bytes", "fromfile"))
_SIZES = frozenset(("getsize", "stat"))
_WRAPS = frozenset(("Path", "str", "open"))


class _File(NamedTuple):
    """path: how it is written, constants filled in; call: where it is saved or loaded; function: around it."""

    path: str
    call: ast.Call
    function: int


def second_file(script: Script) -> tuple[ast.expr, str] | None:
    """Where a file is saved whose size is asked for nowhere, and its path: one that is loaded in the function that
    loads a file whose size, or that of its bytes, is, or that is handed such bytes. None where there is none."""
    if script.tree is None:
        return None
    constants = _constants(script.tree)
    saved = [*_files(script.tree, _SAVES, constants), *_by_helpers(script.tree, _SAVES, constants)]
    read = [*_files(script.tree, _LOADS, constants), *_by_helpers(script.tree, _LOADS, constants)]
    loaded = [each for each in read if each.path in {one.path for one in saved}]
    sized = _sized(script.tree, constants)
    asked = _asked(script.tree)  # size = write(path, weights)
    bytes_of = _bytes_of(script.tree)
    counted = {each.path for each in saved if {each.path, *bytes_of[id(each.call)]} & sized or id(each.call) in asked}
    unpacking = _unpacking(script.tree)
    for each in loaded:
        beside = [one for one in loaded if one.function == each.function and one.path in counted]
        writes = [one for one in saved if one.path == each.path]
        over = [one for one in saved if one.path in counted and one.function == each.function]
        late = all(one.call.lineno < each.call.lineno for one in over)  # else a checkpoint of the training
        named = each.path[:1] in "'\"" and each.function in unpacking  # a path that is handed in leads to these bytes
        if each.path not in counted and late and (beside or named):
            return writes[0].call, each.path
    return None


def _unpacking(tree: ast.Module) -> set[int]:
    """The lines of functions that read weights out of bytes they are handed, `load(io.BytesIO(unpacked(blob)))`."""
    found: set[int] = set()
    for function in nodes(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            handed = {each.arg for each in function.args.args}
            calls = (each for each in nodes(function) if isinstance(each, ast.Call) and last_name(each.func) == "load")
            parts = ([part for arg in call.args[:1] for part in nodes(arg)] for call in calls)
            if any(_named(each, {"BytesIO"}) and _named(each, handed) for each in parts):
                found.add(function.lineno)
    return found


def _named(parts: list[ast.AST], names: set[str]) -> bool:
    return any(getattr(each, "attr", getattr(each, "id", "")) in names for each in parts)


def _constants(tree: ast.Module) -> dict[str, str]:
    """Names of the module that are given one text."""
    given = [each for each in tree.body if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)]
    return {
        target.id: ast.unparse(each.value) for each in given for target in each.targets if isinstance(target, ast.Name)
    }


def _files(tree: ast.AST, names: frozenset[str], constants: dict[str, str]) -> Iterator[_File]:
    around = _around(tree)
    for node in nodes(tree):
        if isinstance(node, ast.Call) and (
            last_name(node.func) in names or _opens(node) == ("wb" if names is _SAVES else "rb")
        ):
            path = _path(node, names is _SAVES, constants)
            if path:
                yield _File(path, node, around.get(id(node), 0))


def _by_helpers(tree: ast.Module, names: frozenset[str], constants: dict[str, str]) -> Iterator[_File]:
    """The same of calls of the script's own functions that save to, or load from, a path that they are handed."""
    helpers: dict[str, tuple[int, str]] = {}
    for function in nodes(tree):
        if isinstance(function, ast.FunctionDef):
            handed = [each.arg for each in function.args.args]
            path = next((each.path for each in _files(function, names, constants) if each.path in handed), "")
            if path:
                helpers[function.name] = handed.index(path), path
    around = _around(tree)
    for node in nodes(tree) if helpers else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in helpers:
            at, name = helpers[node.func.id]
            named = next((each.value for each in node.keywords if each.arg == name), None)
            given = node.args[at] if at < len(node.args) else named
            path = _said(given, constants) if given is not None else ""
            if path:
                yield _File(path, node, around.get(id(node), 0))


def _asked(tree: ast.Module) -> set[int]:
    """The calls whose value is kept or asked for."""
    dropped = {id(each.value) for each in nodes(tree) if isinstance(each, ast.Expr)}
    own = {each.name for each in nodes(tree) if isinstance(each, ast.FunctionDef)}
    calls = (each for each in nodes(tree) if isinstance(each, ast.Call) and getattr(each.func, "id", "") in own)
    return {id(each) for each in calls} - dropped


def _around(tree: ast.AST) -> dict[int, int]:
    """Of each node the line of the innermost function that it stands in."""
    return {
        id(part): function.lineno  # the innermost: it comes last
        for function in nodes(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for part in nodes(function)
    }


def _path(call: ast.Call, saves: bool, constants: dict[str, str]) -> str:
    """What a call saves to or loads from; "" where that is no path of its own: a buffer in memory."""
    if isinstance(call.func, ast.Attribute) and last_name(call.func) in ("write_bytes", "read_bytes", "open"):
        where: ast.expr | None = call.func.value
    else:
        texts = call.args[1:2] if saves and last_name(call.func) in ("save", "save_file", "dump") else call.args[:1]
        where = texts[0] if texts else None
    return _said(where, constants) if where is not None else ""


def _opens(call: ast.Call) -> str:
    """The mode of open(path, "rb") and path.open("rb"); "" of all else."""
    given = call.args[1:2] if isinstance(call.func, ast.Name) else call.args[:1]
    given += [each.value for each in call.keywords if each.arg == "mode"]
    modes = [each.value for each in given if isinstance(each, ast.Constant)]
    return str(modes[0]) if last_name(call.func) == "open" and modes else ""


def _said(where: ast.expr, constants: dict[str, str]) -> str:
    while isinstance(where, ast.Call) and last_name(where.func) in _WRAPS and where.args:
        where = where.args[0]
    text = ast.unparse(where)
    named = any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in nodes(where))
    return constants.get(text, text) if named or isinstance(where, (ast.Name, ast.Attribute)) else ""


def _sized(tree: ast.Module, constants: dict[str, str]) -> set[str]:
    """Paths and names whose size is asked for."""
    found = set()
    for node in nodes(tree):
        if isinstance(node, ast.Call) and last_name(node.func) in _SIZES:
            inner = node.args[0] if node.args else node.func.value if isinstance(node.func, ast.Attribute) else None
            found |= {_said(inner, constants)} if inner is not None else set()
        elif isinstance(node, ast.Call) and last_name(node.func) == "len" and node.args:
            found |= {ast.unparse(node.args[0])}
    return found


def _bytes_of(tree: ast.Module) -> dict[int, set[str]]:
    """What a file is written of, by the call that saves or opens it: `Path(p).write_bytes(blob)`,
    `with open(p, "wb") as file: file.write(blob)`."""
    found: dict[int, set[str]] = defaultdict(set)
    for node in nodes(tree):
        if isinstance(node, ast.Call) and last_name(node.func) == "write_bytes":
            found[id(node)] |= {ast.unparse(each) for each in node.args[:1]}
        for item in node.items if isinstance(node, ast.With) else ():
            if item.optional_vars is not None:
                write = f"{ast.unparse(item.optional_vars)}.write"
                calls = (each for each in nodes(node) if isinstance(each, ast.Call) and each.args)
                found[id(item.context_expr)] |= {
                    ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == write
                }
    return found


__all__ = ["second_file"]
