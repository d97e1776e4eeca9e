"""Generators that are sent values: `x, y = yield total`. Each send walks the body from one yield to the next."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from fairway.audit.flow.core import Loop
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.loops import changed
from fairway.audit.flow.statements import Statements
from fairway.audit.flow.values import NONE, NOTHING, Value, join
from fairway.audit.reading.tree import nodes


@dataclass(frozen=True)
class Plan:
    """A body in parts: what comes once, the loop (None: straight on), and its body before, at and after the yield."""

    once: list[ast.stmt]
    loop: ast.While | ast.For | None
    before: list[ast.stmt]
    at: ast.stmt | None
    after: list[ast.stmt]


class Coroutines(Statements):
    """advance(generator, sent)"""

    def advance(self, obj: Obj, sent: Value) -> Value:
        """next(generator) or generator.send(sent): what it yields next."""
        frame, plan = obj.data, _plan(obj.data.node)
        primed = "#primed" in obj.slots
        self.heap.set(obj, "#primed", 1)
        self.frames.append(frame)
        frame.loops.append(Loop(len(frame.marks)))
        try:
            if primed and self.nest and plan.loop is not None:
                self._drift(changed(plan.loop), *self.nest[-1])
            alive = self._resumed(plan, sent) if primed else self.block(plan.once)
            if isinstance(plan.loop, ast.For) and not primed:
                self.assign(plan.loop.target, self.elements(self.evaluate(plan.loop.iter), plan.loop).any)
            if (plan.loop is not None and primed) or not primed:
                alive = alive and self.block(plan.before)
            self._come_out(alive)
            result = self._suspended(plan)
        finally:
            frame.sent = None
            frame.loops.pop()
            self.frames.pop()
        self.add_content(obj, result, "#elem")
        return result

    def _resumed(self, plan: Plan, sent: Value) -> bool:
        """From where it waits to the end of its turn."""
        self.frame.sent = sent
        if isinstance(plan.loop, ast.While) and plan.at is None:
            self.evaluate(plan.loop.test)
        alive = self.statement(plan.at) if plan.at is not None else True
        self.frame.sent = None
        return alive and self.block(plan.after)

    def _suspended(self, plan: Plan) -> Value:
        """What stands behind the yield at which it waits."""
        where = plan.at if plan.at is not None else plan.loop.test if isinstance(plan.loop, ast.While) else None
        result: Value | None = None
        for each in nodes(where):
            if isinstance(each, ast.Yield):
                value = self.evaluate(each.value) if each.value is not None else NONE
                result = value if result is None else join(result, value)
        return result if result is not None else NOTHING

    def _come_out(self, alive: bool) -> None:
        """Join what left a branch by return, break or continue."""
        frame = self.frame
        record = frame.loops[-1]
        pending = [change for _, change in frame.returns] + record.breaks + record.continues
        for value, _ in frame.returns:
            self.stopped = value if self.stopped is NOTHING else join(self.stopped, value)
        if frame.value is not None:
            self.stopped, frame.value = frame.value, None
        frame.returns.clear()
        record.breaks.clear()
        record.continues.clear()
        self.settle([change for change in pending if change], alive)

    def drained(self, obj: Obj) -> Value:
        """All that it yields when nothing is sent to it: `for x in generator`."""
        frame = obj.data
        self.frames.append(frame)
        try:
            alive = self.block(frame.node.body)
            frame.loops.append(Loop(len(frame.marks)))
            self._come_out(alive)
            frame.loops.pop()
        finally:
            self.frames.pop()
        result = NOTHING
        for n, value in enumerate(frame.yields):
            result = join(result, value) if n else value
        frame.yields.clear()
        self.add_content(obj, result, "#elem")
        return result


def _yields(node: ast.AST) -> bool:
    return any(isinstance(each, (ast.Yield, ast.YieldFrom)) for each in nodes(node))


def _yields_nothing(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, (ast.Assign, ast.Expr)) else None
    given = value.value if isinstance(value, ast.Yield) else statement
    return given is None or (isinstance(given, ast.Constant) and given.value is None)


def _plan(code: ast.FunctionDef) -> Plan:
    """How the body of a generator is walked."""
    body = code.body
    n = next((n for n, each in enumerate(body) if _yields(each)), len(body))
    once, rest = body[:n], body[n:]
    more = next(
        (m for m, each in enumerate(rest[1:], 1) if isinstance(each, (ast.While, ast.For)) and _yields(each)), 0
    )
    if more and _yields_nothing(rest[0]):  # `wanted = yield` before the loop: it waits for the first of what is sent
        once, rest = [*once, *rest[1:more]], rest[more:]
    loop = rest[0] if rest and isinstance(rest[0], (ast.While, ast.For)) else None
    inner = loop.body if loop is not None else rest
    k = next((k for k, each in enumerate(inner) if _yields(each)), None)
    if k is None:
        return Plan(once, loop, [], None, inner)
    return Plan(once, loop, inner[:k], inner[k], inner[k + 1 :])


__all__ = ["Coroutines"]
