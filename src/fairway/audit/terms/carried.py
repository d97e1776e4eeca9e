"""A loop that changes its elements in place, `for row in rows: row[0] = x`: what it goes over has them from then on."""

import ast
from collections.abc import Iterator
from functools import lru_cache

from fairway.audit.reading.tree import nodes

_PLACE = ast.Name("a place of the loop's own", ast.Load())  # no name of a script has blanks


@lru_cache(maxsize=512)
def body_of(node: ast.For | ast.AsyncFor) -> list[ast.stmt]:
    """The loop's statements, and behind them one for each element that they change: `rows[place] = row`."""
    changed = {
        target.value.id
        for each in nodes(node)
        if isinstance(each, (ast.Assign, ast.AugAssign))
        for target in (each.targets if isinstance(each, ast.Assign) else (each.target,))
        if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name)
    }
    behind = [
        ast.fix_missing_locations(ast.copy_location(ast.Assign([ast.Subscript(whole, _PLACE, ast.Store())], one), node))
        for one, whole in _pairs(node.target, node.iter)
        if one.id in changed
    ]
    return [*node.body, *behind]


def _pairs(target: ast.expr, whole: ast.expr) -> Iterator[tuple[ast.Name, ast.expr]]:
    """Names of elements, and the name or attribute of what they are of."""
    if isinstance(target, ast.Name) and isinstance(whole, (ast.Name, ast.Attribute)):
        yield ast.copy_location(ast.Name(target.id, ast.Load()), target), whole
    elif isinstance(target, ast.Tuple) and isinstance(whole, ast.Call) and isinstance(whole.func, ast.Name):
        if whole.func.id == "zip" and len(whole.args) == len(target.elts):
            for one, of in zip(target.elts, whole.args, strict=True):
                yield from _pairs(one, of)
        elif whole.func.id == "enumerate" and whole.args and len(target.elts) == 2:
            yield from _pairs(target.elts[1], whole.args[0])


__all__ = ["body_of"]
