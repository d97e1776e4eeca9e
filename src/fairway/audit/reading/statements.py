"""Statements walked with constants alone: each branch that could be taken, each loop over what is known."""

import ast
from collections.abc import Callable
from typing import Any

from fairway.audit.reading.constants import Constants, bind
from fairway.audit.reading.tree import nodes
from fairway.audit.reading.values import UNKNOWN, Closure, Scope, Space

_DEPTH = 12  # calls within calls


class Returned(Exception):
    """A return statement was reached; value: what it gives."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class Left(Exception):
    """A break or continue; again: whether the loop goes on."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again


class Statements:
    """Walks blocks; `bring` binds what an import names."""

    def __init__(self, constants: Constants, bring: Callable[[ast.Import | ast.ImportFrom, Scope], None]) -> None:
        self.constants, self.bring, self.depth = constants, bring, 0
        self.generators: dict[ast.AST, bool] = {}
        self.parted = False  # whether a condition that nobody knows may have left the loop under way

    def block(self, body: list[ast.stmt], scope: Scope) -> None:
        for statement in body:
            found = getattr(self, f"_{type(statement).__name__}", None)
            if found is not None:
                found(statement, scope)

    def inline(self, closure: Closure, arguments: list[Any], named: dict[str, Any]) -> Any:
        """A call of a function of the script with constants (or UNKNOWN) as arguments."""
        if self.depth >= _DEPTH:
            return UNKNOWN
        node = closure.node
        inner = Scope(self._bound(node.args, arguments, named, closure.scope), closure.scope)
        if self._yields(node):
            return UNKNOWN
        self.depth += 1
        parted = self.parted
        try:
            if isinstance(node, ast.Lambda):
                return self.constants.value(node.body, inner)
            self.block(node.body, inner)
        except Returned as returned:
            return returned.value
        except Left:
            pass
        finally:
            self.depth -= 1
            self.parted = parted
        return None

    def _yields(self, node: ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether a function is a generator."""
        if node not in self.generators:
            inside = nodes(node) if not isinstance(node, ast.Lambda) else ()
            self.generators[node] = any(isinstance(each, (ast.Yield, ast.YieldFrom)) for each in inside)
        return self.generators[node]

    def _bound(
        self, declared: ast.arguments, arguments: list[Any], named: dict[str, Any], scope: Scope
    ) -> dict[str, Any]:
        plain = [*declared.posonlyargs, *declared.args]
        bound: dict[str, Any] = {each.arg: UNKNOWN for each in [*plain, *declared.kwonlyargs]}
        for each, default in zip(plain[len(plain) - len(declared.defaults) :], declared.defaults, strict=True):
            bound[each.arg] = self.constants.value(default, scope)
        for each, chosen in zip(declared.kwonlyargs, declared.kw_defaults, strict=True):
            bound[each.arg] = UNKNOWN if chosen is None else self.constants.value(chosen, scope)
        bound |= {each.arg: value for each, value in zip(plain, arguments, strict=False)}
        bound |= {name: value for name, value in named.items() if name in bound}
        if declared.vararg:
            bound[declared.vararg.arg] = tuple(arguments[len(plain) :])
        if declared.kwarg:
            bound[declared.kwarg.arg] = {name: value for name, value in named.items() if name not in bound}
        return bound

    # One method for each kind of statement.

    def _Expr(self, node: ast.Expr, scope: Scope) -> None:
        self.constants.value(node.value, scope)

    def _Assign(self, node: ast.Assign, scope: Scope) -> None:
        value = self.constants.value(node.value, scope)
        for target in node.targets:
            self._to(target, value, scope)

    def _AnnAssign(self, node: ast.AnnAssign, scope: Scope) -> None:
        if node.value is not None:
            self._to(node.target, self.constants.value(node.value, scope), scope)

    def _AugAssign(self, node: ast.AugAssign, scope: Scope) -> None:
        both = ast.BinOp(_loaded(node.target), node.op, node.value)
        self._to(node.target, self.constants.value(ast.copy_location(both, node), scope), scope)

    def _to(self, target: ast.expr, value: Any, scope: Scope) -> None:
        if isinstance(target, ast.Subscript):
            owner, key = self.constants.value(target.value, scope), self.constants.value(target.slice, scope)
            if isinstance(owner, Scope) and isinstance(key, str):
                owner.names[key] = value
            elif isinstance(owner, (list, dict, bytearray)) and key is not UNKNOWN:
                self.constants.apply(owner.__setitem__, key, value)
        elif isinstance(target, ast.Attribute):
            owner = self.constants.value(target.value, scope)
            if isinstance(owner, Space):
                owner.scope.names[target.attr] = value
        else:
            bind(target, value, scope)

    def _Import(self, node: ast.Import, scope: Scope) -> None:
        self.bring(node, scope)

    _ImportFrom = _Import

    def _FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: Scope) -> None:
        scope.names[node.name] = UNKNOWN if node.decorator_list else Closure(node, scope)

    _AsyncFunctionDef = _FunctionDef

    def _ClassDef(self, node: ast.ClassDef, scope: Scope) -> None:
        inner = Scope(outer=scope)
        for each in node.body:
            if isinstance(each, ast.FunctionDef):
                plain = all(isinstance(d, ast.Name) and d.id == "staticmethod" for d in each.decorator_list)
                inner.names[each.name] = Closure(each, scope) if plain and each.decorator_list else UNKNOWN
            else:
                self.block([each], inner)
        scope.names[node.name] = Space(inner)

    def _Return(self, node: ast.Return, scope: Scope) -> None:
        raise Returned(None if node.value is None else self.constants.value(node.value, scope))

    def _Break(self, node: ast.Break, scope: Scope) -> None:
        raise Left(again=False)

    def _Continue(self, node: ast.Continue, scope: Scope) -> None:
        raise Left(again=True)

    def _If(self, node: ast.If, scope: Scope) -> None:
        test = self.constants.value(node.test, scope)
        if test is not UNKNOWN:
            self.block(node.body if test else node.orelse, scope)
            return
        for body in (node.orelse, node.body):
            self.parted |= self._maybe(body, scope)

    def _maybe(self, body: list[ast.stmt], scope: Scope) -> bool:
        """A block that may or may not run: what leaves it does not leave the function. Whether anything did."""
        try:
            self.block(body, scope)
        except Returned:
            return True
        except Left as left:
            return not left.again
        return False

    def _For(self, node: ast.For, scope: Scope) -> None:
        over = self.constants.value(node.iter, scope)
        items = over if isinstance(over, (str, bytes, bytearray, list, tuple, dict, range)) else [UNKNOWN]
        around = self.parted
        for item in items:
            bind(node.target, item, scope)
            if not self._turn(node.body, scope):
                break
        self.parted = around
        self._maybe(node.orelse, scope)

    def _turn(self, body: list[ast.stmt], scope: Scope) -> bool:
        """A turn of a loop: whether it goes on."""
        try:
            self.block(body, scope)
        except Left as left:
            return left.again
        return True

    _AsyncFor = _For

    def _While(self, node: ast.While, scope: Scope) -> None:
        """Turn by turn, until it may have been left: of what comes after that nothing is known."""
        around, self.parted = self.parted, False
        try:
            while not self.parted:
                test = self.constants.value(node.test, scope)
                if test is not UNKNOWN and not test:
                    return
                if not self._turn(node.body, scope) or test is UNKNOWN:
                    return
        finally:
            self.parted = around

    def _With(self, node: ast.With, scope: Scope) -> None:
        held = [self.constants.value(item.context_expr, scope) for item in node.items]
        for item, value in zip(node.items, held, strict=True):
            if item.optional_vars is not None:
                bind(item.optional_vars, value, scope)
        self.block(node.body, scope)

    _AsyncWith = _With

    def _Try(self, node: ast.Try, scope: Scope) -> None:
        for handler in node.handlers:  # first, so that what the body binds holds in the end
            self._maybe(handler.body, scope)
        self.block([*node.body, *node.orelse, *node.finalbody], scope)

    _TryStar = _Try

    def _Match(self, node: ast.Match, scope: Scope) -> None:
        for case in node.cases:
            self._maybe(case.body, scope)


def _loaded(target: ast.expr) -> ast.expr:
    """The same place, read."""
    if isinstance(target, ast.Name):
        return ast.copy_location(ast.Name(target.id, ast.Load()), target)
    return target
