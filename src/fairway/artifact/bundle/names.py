"""Short names for what functions bind for themselves, and modules under a name of one underscore: 9 % less when packed,
and nothing outside can tell.

Arguments that anything passes by keyword keep their names, and so does every function under a decorator that may look
at them (strip.py), every name that is the module's as well, and all of a function that looks its own names up.
"""

import ast
import builtins
import functools
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping

from fairway.artifact.bundle.strip import harmless

Function = ast.FunctionDef | ast.AsyncFunctionDef
BUILTIN = set(dir(builtins))
LOOKS = {"locals", "vars", "eval", "exec", "globals"}  # called in a function: its names may matter


def shortened(sources: Mapping[str, str]) -> dict[str, str]:
    """The sources of a whole script, its functions' own names shortened."""
    return dict(_shortened(tuple(sources.items())))


@functools.lru_cache(maxsize=8)  # 0.8 s a script: recipes that differ in values alone have the same sources
def _shortened(sources: tuple[tuple[str, str], ...]) -> dict[str, str]:
    trees = {name: ast.parse(source) for name, source in sources}
    nodes = {name: list(ast.walk(tree)) for name, tree in trees.items()}  # names change in place: they stay these
    words = {node.arg for every in nodes.values() for node in every if isinstance(node, ast.keyword) and node.arg}
    asked = {node.attr for every in nodes.values() for node in every if isinstance(node, ast.Attribute)}
    imports = [node for every in nodes.values() for node in every if isinstance(node, ast.ImportFrom)]
    asked |= {alias.name for node in imports for alias in node.names}
    for name, tree in trees.items():
        outside = {node.id for node in _shallow(tree) if isinstance(node, ast.Name)} | _given(tree)
        for function in _outermost(tree):
            _shorten(function, words, outside)
        _shorten_private(tree, nodes[name], asked)
    return {name: ast.unparse(tree) + "\n" if tree.body else "" for name, tree in trees.items()}


def _shorten_private(tree: ast.Module, nodes: list[ast.AST], asked: set[str]) -> None:
    """What a module binds under a name of one underscore, and nothing asks it for. nodes: all of the tree."""
    bound = {node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)}
    bound |= {
        target.id
        for node in tree.body
        for target in (node.targets if isinstance(node, ast.Assign) else ())
        if isinstance(target, ast.Name)
    }
    private = sorted(name for name in bound if re.fullmatch("_[a-zA-Z].*", name) and name not in asked)
    if not private:
        return
    taken = asked | bound | {node.id for node in nodes if isinstance(node, ast.Name)}
    fresh = (f"_{name}" for name in _names() if f"_{name}" not in taken)
    short = {name: next(fresh) for name in private}
    for node in nodes:
        if isinstance(node, ast.Name):
            node.id = short.get(node.id, node.id)
        elif isinstance(node, ast.Global):
            node.names = [short.get(name, name) for name in node.names]
        elif isinstance(node, Function | ast.ClassDef):
            node.name = short.get(node.name, node.name)


def _outermost(tree: ast.AST) -> Iterator[Function]:
    """Functions of the module and of its classes, not those inside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node
        else:
            yield from _outermost(node)


def _shallow(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that stand in no function."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, Function):
            yield from _shallow(node)


def _given(tree: ast.AST) -> set[str]:
    """What the module has by definition and by import."""
    found = set()
    for node in _shallow(tree):
        if isinstance(node, Function | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return found


def _shorten(function: Function, words: set[str], outside: set[str]) -> None:
    nodes = list(ast.walk(function))
    inner = [node for node in nodes if isinstance(node, Function)]
    kept = words | outside | BUILTIN | {"cls"}
    for node in nodes:
        if isinstance(node, ast.Global | ast.Nonlocal | ast.ClassDef | ast.Match):
            return
        if isinstance(node, ast.Name) and node.id in LOOKS:
            return
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if not all(harmless(decorator) for one in inner for decorator in one.decorator_list):
        return
    kept |= {one.name for one in inner}
    counts: Counter[str] = Counter()
    own: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name):
            counts[node.id] += 1
            if isinstance(node.ctx, ast.Store):
                own.add(node.id)
        elif isinstance(node, ast.arg):
            counts[node.arg] += 1
            own.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            counts[node.name] += 1
            own.add(node.name)
    own -= kept
    taken = {name for name in counts if name not in own} | kept
    short = {"self": "s"} if "self" in own and "s" not in taken else {}  # the same in every method
    fresh = (name for name in _names() if name not in taken and name not in short.values())
    short |= {name: next(fresh) for name, _ in counts.most_common() if name in own and name not in short}
    for node in nodes:
        if isinstance(node, ast.Name):
            node.id = short.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg = short.get(node.arg, node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            node.name = short.get(node.name, node.name)


def _names() -> Iterator[str]:
    yield from string.ascii_lowercase
    for first in string.ascii_lowercase:
        for second in string.ascii_lowercase:
            if first + second not in ("as", "if", "in", "is", "or"):
                yield first + second
