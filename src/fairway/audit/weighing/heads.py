"""What functions of modules do with rows: a model's last line may make them whole by a softmax; others mix them."""

from __future__ import annotations

import ast
from functools import lru_cache

from fairway.audit.reading.tree import last_name, nodes, own
from fairway.audit.trial.arrays import Array
from fairway.audit.weighing.rows import log_softmax, softmax

_SOFTMAX = {"log_softmax": log_softmax, "softmax": softmax}


def as_given(logits: Array, how: str) -> Array:
    """The logits as a function gives them back that ends so."""
    if how not in _SOFTMAX:
        return logits
    made = _SOFTMAX[how](logits)
    assert isinstance(made, Array)
    made.net = True
    return made


@lru_cache(maxsize=8)
def endings(tree: ast.Module | None) -> dict[int, str]:
    """By the id of a function's arguments: the softmax that its last line makes, "" for none."""
    functions = (node for node in nodes(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda)))
    return {id(node.args): _ending(node) for node in functions}


def _ending(node: ast.FunctionDef | ast.Lambda) -> str:
    if isinstance(node, ast.Lambda):
        return _made_by(node.body, {})
    assigned = (each for each in own(node.body) if isinstance(each, (ast.Assign, ast.Return)))
    body = sorted(assigned, key=lambda each: (each.lineno, each.col_offset))  # the last that binds a name counts
    named: dict[str, ast.expr] = {}
    for each in body:
        if isinstance(each, ast.Assign) and len(each.targets) == 1 and isinstance(each.targets[0], ast.Name):
            named[each.targets[0].id] = each.value
    found = {_made_by(each.value, named) for each in body if isinstance(each, ast.Return) and each.value is not None}
    return found.pop() if len(found) == 1 else ""


def _made_by(value: ast.expr, named: dict[str, ast.expr]) -> str:
    """log_softmax(z), z.log_softmax(-1), z - z.logsumexp(-1)"""
    if isinstance(value, ast.Name) and value.id in named:
        value = named[value.id]
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Sub):
        return "log_softmax" if last_name(getattr(value.right, "func", None)) == "logsumexp" else ""
    name = last_name(value.func) if isinstance(value, ast.Call) else ""
    return name if name in _SOFTMAX else ""


@lru_cache(maxsize=8)
def mixers(tree: ast.Module | None) -> frozenset[int]:
    """The ids of the arguments of functions that make a softmax of what they are handed, `mix(self, logits, seq)`:
    these are no model, but what is done with its rows."""
    functions = (node for node in nodes(tree) if isinstance(node, ast.FunctionDef))
    return frozenset(id(node.args) for node in functions if _softens(node))


def _softens(node: ast.FunctionDef) -> bool:
    given = {each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)} - {"self"}
    for call in own(node.body):
        if isinstance(call, ast.Call) and last_name(call.func) in _SOFTMAX:
            base = call.func.value if isinstance(call.func, ast.Attribute) else None
            about = {each.id for part in (base, *call.args[:1]) for each in nodes(part) if isinstance(each, ast.Name)}
            if about & given:
                return True
    return False


__all__ = ["as_given", "endings", "mixers"]
