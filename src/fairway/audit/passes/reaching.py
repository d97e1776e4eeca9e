"""Where a script says from where to where a step learns."""

from __future__ import annotations

import ast

from fairway.audit.case import Case
from fairway.audit.reading.tree import last_name, nodes


def reaching(case: Case, lines: tuple[int, ...]) -> int:
    """The line in the functions of these calls, but the one that calls the first, that says from where to where:
    `range(begin, end, step)`; or how far, `stop = min(begin + 2 * chunk, total)`, or a call that does."""
    inside = [around(case, line) for line in lines[1:]]
    ranges = (
        each.lineno
        for function in inside
        if function is not None
        for each in nodes(function)
        if isinstance(each, ast.Call) and len(each.args) > 1 and ast.unparse(each.func).endswith("range")
    )
    further = (each.lineno for each in nodes(case.body.tree) if isinstance(each, ast.Call) and _further(each, lines))
    own: list[ast.AST] = [function for function in inside if function is not None]
    told = (each.lineno for each in nodes(case.body.tree) if isinstance(each, ast.Call) and _past_its_end(each, lines))
    said = further_end(case, lines) or next(told, 0) or next(ranges, 0) or next(further, 0)
    return said or _bounded(own) or _bounded(_called_by(case, own))


def _bounded(functions: list[ast.AST]) -> int:
    """The first line that bounds how far something goes, `stop = min(begin + 2 * chunk, total)`."""
    bounds = (
        each.lineno
        for function in functions
        for each in nodes(function)
        if isinstance(each, ast.Assign) and _is_bound(each.value)
    )
    return min(bounds, default=0)


def _called_by(case: Case, functions: list[ast.AST]) -> list[ast.AST]:
    """The script's own functions that these call by their names: one hands them the part that they learn from."""
    names = {last_name(each.func) for own in functions for each in nodes(own) if isinstance(each, ast.Call)}
    made = (each for each in nodes(case.body.tree) if isinstance(each, ast.FunctionDef) and each.name in names)
    return [each for each in made if each not in functions]


def further_end(case: Case, lines: tuple[int, ...]) -> int:
    """The line in the functions of these calls, or of those that one of these lines calls besides, that says how far,
    by several of something on top of where a chunk begins or ends: `reach = min(end + more * chunk, total)`."""
    functions = [each for line in lines if (each := around(case, line)) is not None]
    beside = [each for each in _called_in(case, lines) if each not in functions]
    return max((line for each in functions for line in _far_ends(each)), default=0) or max(
        (line for each in beside for line in _far_ends(each)), default=0
    )


def _called_in(case: Case, lines: tuple[int, ...]) -> list[ast.AST]:
    """The script's own functions that are called by their name in one of these lines."""
    names = {
        last_name(each.func) for each in nodes(case.body.tree) if isinstance(each, ast.Call) and each.lineno in lines
    }
    made = (each for each in nodes(case.body.tree) if isinstance(each, ast.FunctionDef))
    return [each for each in made if each.name in names]


def _far_ends(function: ast.AST) -> list[int]:
    """The lines that bind or give back what reaches further than a chunk."""
    said = (each for each in nodes(function) if isinstance(each, (ast.Assign, ast.Return)))
    return [
        each.lineno
        for each in said
        for value in (each.value.elts if isinstance(each.value, ast.Tuple) else [each.value])
        if value is not None and _is_bound(value) and _adds_several(value, function)
    ]


def _adds_several(value: ast.expr, function: ast.AST) -> bool:
    """begin + 2 * chunk, (n + 1) * chunk + more; not (n + 1) * chunk, n * chunk + chunk, nor begin + step * rows of a
    loop over steps, nor what each rank begins with."""
    sums = [each for each in nodes(value) if isinstance(each, ast.BinOp) and isinstance(each.op, ast.Add)]
    turned = {
        name.id
        for loop in nodes(function)
        if isinstance(loop, ast.For)
        for name in nodes(loop.target)
        if isinstance(name, ast.Name)
    }
    own = turned | {"rank"}
    several = [
        each.right for each in sums if _is_product(each.right) and not own & set(map(last_name, nodes(each.right)))
    ]
    if several:
        return True
    bound = {  # to what each name is bound
        each.targets[0].id: each.value
        for each in nodes(function)
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name)
    }
    ends = [bound.get(each.left.id, each.left) if isinstance(each.left, ast.Name) else each.left for each in sums]
    return any(_is_end(end) and _has_name(each.right) for each, end in zip(sums, ends, strict=True))


def _has_name(value: ast.expr) -> bool:
    """`more` and `self.reach // 2`, not `1`."""
    return any(map(last_name, nodes(value)))


def _is_product(value: ast.expr) -> bool:
    return isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult)


def _is_end(value: ast.expr) -> bool:
    """(n + 1) * chunk"""
    parts = [each for each in nodes(value) if isinstance(each, ast.BinOp) and isinstance(each.op, ast.Add)]
    return _is_product(value) and any(isinstance(each.right, ast.Constant) for each in parts)


def _is_bound(value: ast.expr) -> bool:
    """min(begin + 2 * chunk, total)"""
    called = isinstance(value, ast.Call) and getattr(value.func, "id", "") == "min"
    return called and any(isinstance(p, ast.BinOp) and isinstance(p.op, ast.Add) for p in nodes(value))


def _further(call: ast.Call, lines: tuple[int, ...]) -> bool:
    """Whether a call in one of these lines says itself how far: `adapt(begin, min(end + more, total))`."""
    inner = (part for each in call.args for part in nodes(each))
    return call.lineno in lines[:-1] and any(isinstance(p, ast.BinOp) and isinstance(p.op, ast.Add) for p in inner)


def _past_its_end(call: ast.Call, lines: tuple[int, ...]) -> bool:
    """Whether a call in one of these lines adds something to where a part ends: `adapt(begin, end + more)`, not
    `adapt(begin, begin + size)`, nor the target that follows, `tokens[begin : end + 1]`."""
    if call.lineno not in lines[:-1]:
        return False
    parts = [part for each in call.args for part in nodes(each)]
    plain = [*call.args, *(each.lower for each in parts if isinstance(each, ast.Slice) and each.lower is not None)]
    begins = {ast.unparse(each) for each in plain}
    ends = [*call.args, *(each.upper for each in parts if isinstance(each, ast.Slice) and each.upper is not None)]
    return any(
        isinstance(end, ast.BinOp)
        and isinstance(end.op, ast.Add)
        and _has_name(end.right)
        and ast.unparse(end.left) not in begins
        for end in ends
    )


def around(case: Case, line: int) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The innermost function that a line stands in."""
    found = (
        node
        for node in nodes(case.body.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.lineno <= line <= (node.end_lineno or 0)
    )
    return max(found, key=lambda node: node.lineno, default=None)


__all__ = ["around", "further_end", "reaching"]
