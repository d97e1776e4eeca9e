"""Source without what only people and checkers read: docstrings, comments, annotations. What is left does the same.

Annotations stay where something reads them while the program runs: in the bodies of dataclasses and named tuples, and
on functions under a decorator that is not known to leave them alone (a Triton kernel's `tl.constexpr`).
"""

import ast
from typing import TypeVar

Node = TypeVar("Node", ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

FIELDS_BY_BASE = {"NamedTuple", "TypedDict"}
HARMLESS = {  # decorators that read no annotations
    *("property", "setter", "staticmethod", "classmethod", "abstractmethod", "overload", "contextmanager"),
    *("cache", "lru_cache", "cached_property", "no_grad", "inference_mode", "wraps"),
}


def stripped(tree: ast.Module) -> ast.Module:
    """The tree, stripped in place."""
    found = _Strip().visit(tree)
    assert isinstance(found, ast.Module)
    return ast.fix_missing_locations(found)


class _Strip(ast.NodeTransformer):
    def __init__(self) -> None:
        self.fields = False  # whether the innermost body is that of a class whose annotations are its fields

    def visit_Module(self, node: ast.Module) -> ast.Module:
        return self._body(node, fields=False)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return self._body(node, bool(node.decorator_list) or any(_last(base) in FIELDS_BY_BASE for base in node.bases))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        return self._function(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        self.generic_visit(node)
        if self.fields:
            return node
        return None if node.value is None else ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | None:
        self.generic_visit(node)
        idle = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str | type(...))
        return None if idle else node

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt] | None:
        self.generic_visit(node)
        if _last(node.test) == "TYPE_CHECKING":
            return node.orelse
        node.body = node.body or [ast.Pass()]
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        found = super().generic_visit(node)
        if isinstance(found, ast.For | ast.While | ast.With | ast.Try | ast.ExceptHandler) and not found.body:
            found.body = [ast.Pass()]
        return found

    def _function(self, node: Node) -> Node:
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if all(map(harmless, node.decorator_list)):
            node.returns = None
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
        return self._body(node, fields=False)

    def _body(self, node: Node, fields: bool) -> Node:
        before, self.fields = self.fields, fields
        self.generic_visit(node)
        self.fields = before
        if not node.body and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]
        return node


def harmless(decorator: ast.expr) -> bool:
    """Whether a decorator is known to read neither annotations nor names."""
    return _last(decorator) in HARMLESS


def _last(node: ast.expr) -> str:
    """The last name of a dotted one, called or not: `functools.lru_cache(maxsize=4)` is lru_cache."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
