"""Functions and classes of the script."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fairway.audit.reading.tree import is_generator
from fairway.audit.trial.host import Compute
from fairway.audit.trial.statements import Run, Statements
from fairway.audit.trial.values import Class, Frame, Func, Lib, Value


class Definitions(Statements):
    """Mixed into the compiler."""

    def _s_functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Run:
        made = self.function(node, node.args, node.name, node.body)
        decorators = [self.compiled(each) for each in node.decorator_list]
        host = self.host

        def run(frame: Frame) -> None:
            value: Value = made(frame)
            for decorator in reversed(decorators):
                value = host.decorated(value, decorator(frame), node.lineno)
            frame.bind(node.name, value)

        return run

    _s_asyncfunctiondef = _s_functiondef

    def function(self, node: ast.AST, args: ast.arguments, name: str, body: Any) -> Compute:
        defaults = [self.compiled(each) for each in args.defaults]
        named = [
            (arg.arg, self.compiled(value))
            for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True)
            if value is not None
        ]
        yields = is_generator(node)
        once: list[Callable[[Frame], Value]] = []  # the body is compiled when it is first called
        host = self.host

        def run(frame: Frame) -> Value:
            if not once:
                once.append(self._body(node, body, yields))
            return once[0](frame)

        def made(frame: Frame) -> Value:
            func = Func(name, args, run, frame, host.call_function, yields=yields)
            func.defaults = [each(frame) for each in defaults]
            func.keyword_defaults = {key: each(frame) for key, each in named}
            return func

        return made

    def _body(self, node: ast.AST, body: Any, yields: bool) -> Callable[[Frame], Value]:
        if isinstance(node, ast.Lambda):
            return self._said_at(node.body)
        if yields:
            return self.generator(body)
        run = self.block(body)

        def plain(frame: Frame) -> Value:
            left = run(frame)
            return left.value if left is not None else None

        return plain

    def _said_at(self, value: ast.expr) -> Compute:
        """What a lambda gives, worked out in its own line and not in that of the call: as the walk has it."""
        compute, host = self.compiled(value), self.host

        def said(frame: Frame) -> Value:
            host.step(value.lineno)
            return compute(frame)

        return said

    def generator(self, nodes: list[ast.stmt]) -> Callable[[Frame], Iterator[Value]]:
        raise NotImplementedError

    def _s_classdef(self, node: ast.ClassDef) -> Run:
        bases, body = [self.compiled(each) for each in node.bases], self.block(node.body)
        decorators = [self.compiled(each) for each in node.decorator_list]
        fields = [
            (each.target.id, each.value is not None)
            for each in node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        ]
        hints = {
            each.target.id: self.compiled(each.annotation)
            for each in node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        }
        host = self.host

        def run(frame: Frame) -> None:
            inner = Frame(frame)
            made = Class(node.name, [base(frame) for base in bases], inner.vars)
            inner.owner = made
            body(inner)
            for each in inner.vars.values():
                func = getattr(each, "func", each)
                if isinstance(func, Func):
                    func.owner = made
            _detach(inner, frame)
            made.fields = [(name, partial(inner.vars.get, name) if given else None) for name, given in fields]
            made.hints = {name: partial(hint, frame) for name, hint in hints.items()}
            if any(base.name == "NamedTuple" for base in made.bases if isinstance(base, Lib)):
                made.made = "tuple"
            value: Value = made
            for decorator in reversed(decorators):
                value = host.decorated(value, decorator(frame), node.lineno)
            frame.bind(node.name, value)

        return run


def _detach(inner: Frame, outer: Frame) -> None:
    """Methods see the names around the class, not those in it."""
    for each in inner.vars.values():
        func = getattr(each, "func", each)
        if isinstance(func, Func) and func.frame is inner:
            func.frame = outer
