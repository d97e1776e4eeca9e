"""Functions, classes and imports."""

from __future__ import annotations

import ast
from typing import Any

from fairway.audit.flow.heap import Obj
from fairway.audit.flow.patterns import Patterns
from fairway.audit.flow.values import NOTHING, Value


class Definitions(Patterns):
    """What def, class and import bind."""

    def statement(self, node: ast.stmt) -> bool:
        raise NotImplementedError

    def _do_FunctionDef_(self, node: Any) -> None:
        value = self.function(node)
        for obj in value.refs:
            for each in node.decorator_list:
                name = ast.unparse(each) if len(ast.dump(each)) < 2000 else ""
                last = name.split("(")[0].rsplit(".", 1)[-1]
                if last in ("staticmethod", "classmethod", "property", "cached_property"):
                    obj.slots["#kind"] = {"staticmethod": "static", "classmethod": "class"}.get(last, "property")
                if last in ("setter", "getter", "deleter"):
                    return
        for each in reversed(node.decorator_list):
            decorator = self.evaluate(each)
            if _keeps_names(each):
                continue
            if any(obj.kind in ("function", "bound", "class", "partial", "instance") for obj in decorator.refs):
                made = self.call(decorator, [value], {}, each)
                value = made if made.refs else value
        self.assign(ast.Name(node.name, ast.Store()), value)

    _do_AsyncFunctionDef_ = _do_FunctionDef_

    def _do_ClassDef_(self, node: ast.ClassDef) -> None:
        cls = self.new("class", node, node)
        bases = tuple(self.evaluate(each) for each in node.bases)
        cls.slots["#bases"] = Value(items=bases)
        cls.slots["#fields"] = tuple(
            each.target.id
            for each in node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        )
        frame = self.frame
        from fairway.audit.flow.core import Frame

        closure = (frame.obj, *frame.closure) if frame.obj is not frame.globals else frame.closure
        inner = Frame(cls, frame.script, frame.globals, closure, None, cls, line=node.lineno)
        self.frames.append(inner)
        try:
            self._class_body(node, cls, frame)
        finally:
            self.frames.pop()
        value = self.ref(cls)
        for each in reversed(node.decorator_list):
            decorator = self.evaluate(each)
            if any(obj.kind in ("function", "bound") for obj in decorator.refs):
                made = self.call(decorator, [value], {}, each)
                value = made if made.refs else value
        self.assign(ast.Name(node.name, ast.Store()), value)

    def _class_body(self, node: ast.ClassDef, cls: Obj, outer: Any) -> None:
        for each in node.body:
            if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.frame.line = each.lineno
                self._do_FunctionDef_(each)
                for obj in cls.slots.get(each.name, NOTHING).refs:  # a method does not see its class's names
                    if obj.kind == "function" and obj.data[0] is each:
                        code, script, scope, closure, _ = obj.data
                        obj.data = (code, script, scope, tuple(s for s in closure if s is not cls), cls)
            else:
                self.statement(each)

    # Imports.
    def _do_Import_(self, node: ast.Import) -> None:
        for alias in node.names:
            module = self.imported(alias.name, node)
            if alias.asname:
                self.assign(ast.Name(alias.asname, ast.Store()), module if module else self.outside(alias.name))
            else:
                top = alias.name.split(".")[0]
                own = self.imported(top, node)
                self.assign(ast.Name(top, ast.Store()), own if own else self.outside(top))

    def _do_ImportFrom_(self, node: ast.ImportFrom) -> None:
        module = self.imported(node.module or "", node)
        for alias in node.names:
            name = alias.asname or alias.name
            if module is None:
                self.assign(ast.Name(name, ast.Store()), self.outside(f"{node.module or ''}.{alias.name}"))
                continue
            for obj in module.refs:
                if alias.name == "*":
                    for key, value in list(obj.slots.items()):
                        if isinstance(value, Value) and not str(key).startswith("_"):
                            self.heap.set(self.frame.obj, key, value)
                else:
                    self.assign(ast.Name(name, ast.Store()), self.get(module, alias.name, node))

    def imported(self, name: str, node: ast.AST) -> Value | None:
        raise NotImplementedError


def _keeps_names(decorator: ast.expr) -> bool:
    """@functools.wraps(other): what it decorates stays what it is, under the other's name."""
    if not isinstance(decorator, ast.Call):
        return False
    function = decorator.func
    return (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")) == "wraps"
