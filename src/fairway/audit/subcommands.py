"""Sub-commands of argparse: the call that hangs on which one was asked for is made that of the run that scores.

A script may be several programs: `options.call(options)` runs what `set_defaults(call=...)` of the chosen sub-command
names. A score is that of the one that does the most, training and evaluation in one; `settle` writes its function into
the syntax tree in the place of the attribute, so that all readings follow it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from fairway.audit.reading.tree import nodes

INSTEAD = "fairway_instead_of"
"""Under this name a node that was put in has the attribute in whose place it stands."""
_DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def settle(trees: Sequence[ast.Module]) -> None:
    """Changes the calls `x.NAME(...)` of every tree that calls `set_defaults(NAME=function)` more than once."""
    for tree in trees:
        named: dict[str, list[str]] = {}
        for node in nodes(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "set_defaults":
                for word in node.keywords:
                    if word.arg is not None and isinstance(word.value, ast.Name):
                        named.setdefault(word.arg, []).append(word.value.id)
        known = {node.name: node for node in tree.body if isinstance(node, _DEFS)}
        for name, functions in named.items():
            functions = [each for each in functions if each in known]
            if len(functions) > 1:
                _put_in(tree, name, max(functions, key=lambda each: _reach(each, known)))


def _reach(name: str, known: Mapping[str, ast.stmt]) -> int:
    """The lines of a function and of all functions and classes of the script that it names."""
    waiting, seen = [name], set[str]()
    while waiting:
        each = waiting.pop()
        if each in seen or each not in known:
            continue
        seen.add(each)
        waiting += [node.id for node in nodes(known[each]) if isinstance(node, ast.Name)]
    return sum((known[each].end_lineno or 0) - known[each].lineno + 1 for each in seen)


def _put_in(tree: ast.Module, name: str, function: str) -> None:
    for node in nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
            put = ast.copy_location(ast.Name(function, ast.Load()), node.func)
            setattr(put, INSTEAD, node.func)
            node.func = put


__all__ = ["INSTEAD", "settle"]
