"""The nodes of a script's tree, gathered once and kept in it."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

_BELOW, _YIELDS = "_fairway_below", "_fairway_yields"  # no fields: no walk, dump or comparison of trees sees them
_WEIGHTS = re.compile(r"\.(named_)?(parameters|modules|buffers|children)\(|\.state_dict\(")
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def nodes(tree: ast.AST | None) -> tuple[ast.AST, ...]:
    """As ast.walk gives them. Some twenty rules, readings and trials ask for all 14,000 nodes of a script of 1,300
    lines, and for those of its functions and loops: to walk anew was a tenth of an audit. () where there is no tree."""
    if tree is None:
        return ()
    below = tree.__dict__.get(_BELOW)
    if below is None:
        below = tuple(ast.walk(tree))[1:]  # without the node itself: a tree that holds itself is freed late
        setattr(tree, _BELOW, below)
    return (tree, *below)


def own(statements: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes of statements, without those inside functions and classes that they define."""
    waiting = list(statements)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, _SCOPES):
            waiting.extend(ast.iter_child_nodes(node))


def last_name(node: ast.AST | None) -> str:
    """The last part of a name, `c` of `a.b.c`; "" of what has none."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def has_yield(statements: Iterable[ast.AST]) -> bool:
    """Whether a function of these statements is a generator."""
    return any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in own(statements))


def is_generator(code: Any) -> bool:
    """Whether a function (or a lambda, whose body is no list) yields."""
    found = code.__dict__.get(_YIELDS)
    if found is None:
        found = isinstance(code.body, list) and has_yield(code.body)
        setattr(code, _YIELDS, found)
    return bool(found)


@lru_cache(maxsize=8)
def fluent(tree: ast.Module | None) -> frozenset[int]:
    """The ids of the arguments of methods that give their object back, `return self`."""
    found: set[int] = set()
    for node in nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.args.args:
            told = [each.value for each in own(node.body) if isinstance(each, ast.Return)]
            if told and all(isinstance(each, ast.Name) and each.id == node.args.args[0].arg for each in told):
                found.add(id(node.args))
    return frozenset(found)


@lru_cache(maxsize=8)
def classes(tree: ast.AST | None) -> list[range]:
    """The lines of classes."""
    return [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in nodes(tree)
        if isinstance(node, ast.ClassDef)
    ]


def over_weights(tree: ast.AST | None) -> list[range]:
    """The lines of loops over the weights of a model: what they pick learns, or is stored, and sums no losses."""
    loops = (each for each in nodes(tree) if isinstance(each, ast.For) and _WEIGHTS.search(ast.unparse(each.iter)))
    return [range(each.lineno, (each.end_lineno or each.lineno) + 1) for each in loops]


__all__ = ["has_yield", "is_generator", "last_name", "nodes", "over_weights", "own"]
