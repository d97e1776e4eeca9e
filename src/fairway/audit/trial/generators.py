"""Bodies that yield: the same statements, run as Python generators so that each waits at its yield."""

from __future__ import annotations

import ast
from collections.abc import Callable, Generator, Iterator

from fairway.audit.reading.tree import has_yield
from fairway.audit.trial.definitions import Definitions
from fairway.audit.trial.statements import BREAK, CONTINUE, Left
from fairway.audit.trial.values import UNKNOWN, Frame, Raised, Undecided, Value

Steps = Callable[[Frame], Generator[Value, Value, Left | None]]
"""Yields the values; returns (StopIteration.value) how the block was left, or None."""


class Generators(Definitions):
    """Mixed into the compiler."""

    def generator(self, nodes: list[ast.stmt]) -> Callable[[Frame], Iterator[Value]]:
        body = self._steps(nodes)

        def run(frame: Frame) -> Generator[Value, Value, Value]:
            left = yield from body(frame)
            return left.value if left is not None else None

        return run

    def _steps(self, nodes: list[ast.stmt]) -> Steps:
        parts = [(self._yielding(node) if has_yield([node]) else None, self.statement(node)) for node in nodes]
        host = self.host

        def run(frame: Frame) -> Generator[Value, Value, Left | None]:
            for yielding, plain in parts:
                host.step()
                left = (yield from yielding(frame)) if yielding is not None else plain(frame)
                if left is not None:
                    return left
            return None

        return run

    def _yielding(self, node: ast.stmt) -> Steps:
        made: Steps = getattr(self, f"_y_{type(node).__name__.lower()}", self._y_other)(node)
        return made

    def _y_other(self, node: ast.stmt) -> Steps:
        """`yield x`, `y = yield x`, `yield from x`, `return (yield x)`."""
        value = getattr(node, "value", None)
        if not isinstance(value, (ast.Yield, ast.YieldFrom)):
            return self._y_elsewhere(node)
        sent = self.compiled(value.value) if value.value is not None else None
        targets = getattr(node, "targets", None) or [each for each in [getattr(node, "target", None)] if each]
        binds = [self.target(each) for each in targets]
        host, whole, returns = self.host, isinstance(value, ast.YieldFrom), isinstance(node, ast.Return)

        def run(frame: Frame) -> Generator[Value, Value, Left | None]:
            found = sent(frame) if sent is not None else None
            if whole:
                yield from host.items(found)
                got = UNKNOWN
            else:
                got = yield found
            for bind in binds:
                bind(frame, got)
            return Left("return", got) if returns else None

        return run

    def _y_elsewhere(self, node: ast.stmt) -> Steps:
        plain = self.statement(node)

        def run(frame: Frame) -> Generator[Value, Value, Left | None]:
            return plain(frame)
            yield

        return run

    def _y_if(self, node: ast.If) -> Steps:
        test, body, orelse = self.compiled(node.test), self._steps(node.body), self._steps(node.orelse)
        host = self.host

        def run(frame: Frame) -> Generator[Value, Value, Left | None]:
            try:
                holds = host.truth(test(frame))
            except Undecided:
                host.doubt(node.lineno)
                holds = True
            left = yield from (body if holds else orelse)(frame)
            return left

        return run

    def _y_for(self, node: ast.For) -> Steps:
        source, bind = self.compiled(node.iter), self.target(node.target)
        body, orelse, host = self._steps(node.body), self._steps(node.orelse), self.host

        def run(frame: Frame) -> Generator[Value, Value, Left | None]:
            over = source(frame)
            since = host.mark(over)
            for item in host.items(over):
                host.step()
                bind(frame, item)
                left = yield from body(frame)
                if left is BREAK or host.aimless(since):
                    return None
                if left is not None and left is not CONTINUE:
                    return left
            left = yield from orelse(frame)
            return left

        return run

    def _y_while(self, node: ast.While) -> Steps:
        test, body, host = self.compiled(node.test), self._steps(node.body), self.host

        def run(frame: Frame) -> Generator[Value, Value, Left | None]:
            since, unsure = host.mark(), False
            while not unsure:
                host.step()
                try:
                    if not host.truth(test(frame)):
                        return None
                except Undecided:
                    host.doubt(node.lineno)
                    unsure = True
                left = yield from body(frame)
                if left is BREAK or host.aimless(since):
                    return None
                if left is not None and left is not CONTINUE:
                    return left
            return None

        return run

    def _y_with(self, node: ast.With) -> Steps:
        managers = [
            (self.compiled(each.context_expr), self.target(each.optional_vars) if each.optional_vars else None)
            for each in node.items
        ]
        body, host = self._steps(node.body), self.host

        def run(frame: Frame) -> Generator[Value, Value, Left | None]:
            opened: list[Value] = []
            for value, bind in managers:
                opened.append(value(frame))
                entered = host.enter(opened[-1])
                if bind is not None:
                    bind(frame, entered)
            left = yield from body(frame)
            for manager in reversed(opened):
                host.leave(manager, None)
            return left

        return run

    def _y_try(self, node: ast.Try) -> Steps:
        body, final = self._steps(node.body), self.block(node.finalbody)
        handlers = [
            (self.compiled(each.type) if each.type is not None else None, self._steps(each.body))
            for each in node.handlers
        ]
        orelse, host = self._steps(node.orelse), self.host

        def run(frame: Frame) -> Generator[Value, Value, Left | None]:
            try:
                host.handlers += bool(handlers)
                try:
                    left = yield from body(frame)
                finally:
                    host.handlers -= bool(handlers)
                if left is None:
                    left = yield from orelse(frame)
            except Raised as error:
                fitting = [act for kind, act in handlers if kind is None or host.caught(error, kind(frame))]
                if not fitting:
                    final(frame)
                    raise
                left = yield from fitting[0](frame)
            return final(frame) or left

        return run


__all__ = ["Generators"]
