"""A second file of weights, that the evaluation reads beside the artifact and whose size nobody asks for."""

from __future__ import annotations

import ast
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
    saved = list(_files(script.tree, _SAVES, constants))
    loaded = [each for each in _files(script.tree, _LOADS, constants) if each.path in {one.path for one in saved}]
    sized = _sized(script.tree, constants)
    counted = {each.path for each in saved if each.path in sized or _bytes_of(each.call) & sized}
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


def _files(tree: ast.Module, names: frozenset[str], constants: dict[str, str]) -> Iterator[_File]:
    around = {
        id(part): function.lineno  # the innermost: it comes last
        for function in nodes(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for part in nodes(function)
    }
    for node in nodes(tree):
        if isinstance(node, ast.Call) and (
            last_name(node.func) in names or _opens(node) == ("wb" if names is _SAVES else "rb")
        ):
            path = _path(node, names is _SAVES, constants)
            if path:
                yield _File(path, node, around.get(id(node), 0))


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


def _bytes_of(save: ast.Call) -> set[str]:
    """What a file is written of: `Path(p).write_bytes(blob)`."""
    return {ast.unparse(each) for each in save.args[:1]} if last_name(save.func) == "write_bytes" else set()


__all__ = ["second_file"]
