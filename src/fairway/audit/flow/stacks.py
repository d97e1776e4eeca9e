"""contextlib.ExitStack as the `with` statements that it stands for."""

from __future__ import annotations

import ast

_ENTERS = ("enter_context", "enter_async_context")
_LEAVES = ("callback", "push_async_callback")


def stacks_of(items: list[ast.withitem]) -> frozenset[str]:
    """The names of the stacks of a `with`."""
    return frozenset(
        item.optional_vars.id
        for item in items
        if isinstance(item.optional_vars, ast.Name)
        and isinstance(item.context_expr, ast.Call)
        and ast.unparse(item.context_expr.func).endswith("ExitStack")
    )


def unstacked(body: list[ast.stmt], stacks: frozenset[str]) -> list[ast.stmt]:
    """`model = stack.enter_context(m)` and what follows it, as `with m as model:` around what follows; what is called
    back at the end stands in a `finally`."""
    for n, each in enumerate(body) if stacks else ():
        call, target = _asked(each, stacks)
        if call is None or not isinstance(call.func, ast.Attribute):
            continue
        made: list[ast.stmt] | None = getattr(each, "_fairway_unstacked", None)
        if made is None:
            rest = unstacked(body[n + 1 :], stacks) or [ast.copy_location(ast.Pass(), each)]
            entered: list[ast.stmt] = [ast.With([ast.withitem(call.args[0], target)], rest)]
            made = entered if call.func.attr in _ENTERS else _called_back(call, rest)
            made = [ast.copy_location(one, each) for one in made]
            each._fairway_unstacked = made  # type: ignore[attr-defined]
        return [*body[:n], *made]
    return body


def _called_back(call: ast.Call, rest: list[ast.stmt]) -> list[ast.stmt]:
    """`stack.callback(f, a)`: what f and a are here is what is called at the end."""
    given = [*call.args, *(word.value for word in call.keywords)]
    names = [f"{call.lineno}:{call.col_offset}:{n}" for n in range(len(given))]  # no script has such names
    kept = ast.Assign([ast.Tuple([ast.Name(name, ast.Store()) for name in names], ast.Store())], ast.Tuple(given))
    args: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names]
    first = args.pop(0)
    words = [ast.keyword(word.arg, name) for word, name in zip(call.keywords, args[len(call.args) - 1 :], strict=True)]
    left = ast.copy_location(ast.Call(first, args[: len(call.args) - 1], words), call)
    return [kept, ast.Try(rest, [], [], [ast.copy_location(ast.Expr(left), call)])]


def _asked(node: ast.stmt, stacks: frozenset[str]) -> tuple[ast.Call | None, ast.expr | None]:
    """The call of a statement that enters a context or names what is called back, and what its result is given to."""
    value: ast.expr | None = node.value if isinstance(node, ast.Expr) else None
    target: ast.expr | None = None
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        value, target = node.value, node.targets[0]
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute) or not value.args:
        return None, None
    owner, name = value.func.value, value.func.attr
    known = isinstance(owner, ast.Name) and owner.id in stacks and name in (*_ENTERS, *_LEAVES)
    return (value, target) if known and (target is None or name in _ENTERS) else (None, None)


__all__ = ["stacks_of", "unstacked"]
