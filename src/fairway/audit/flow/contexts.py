"""`with`: what is done on the way in, the body, and what is done on the way out."""

from __future__ import annotations

import ast
from collections.abc import Callable

from fairway.audit.flow.core import Frame
from fairway.audit.flow.coroutines import Coroutines
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.stacks import stacks_of, unstacked
from fairway.audit.flow.values import NONE, Value


class Contexts(Coroutines):
    """with a, b as c: ..."""

    def _do_With_(self, node: ast.With | ast.AsyncWith) -> bool:
        return self._within(node.items, unstacked(node.body, stacks_of(node.items)))

    _do_AsyncWith_ = _do_With_

    def _within(self, items: list[ast.withitem], body: list[ast.stmt]) -> bool:
        """The body with these entered, the first of them outermost."""
        if not items:
            return self.block(body)
        first, done = items[0], list[bool]()

        def inside(value: Value) -> None:
            if first.optional_vars is not None:
                self.assign(first.optional_vars, value)
            done.append(self._within(items[1:], body))

        value = self._entered_by_yield(first.context_expr, inside)
        if done:  # the function that makes it has yielded, and gone on to its end
            return done[0]
        self._captured(value, body)
        managers = sorted((obj for obj in value.refs if obj.kind == "instance"), key=lambda each: each.number)
        inside(self._entered(value, managers, first.context_expr))
        for obj in managers:
            left = self.find(obj.data, "__exit__")
            if left is not None:
                self.call(self.bound(left[0], self.ref(obj), obj.data), [NONE, NONE, NONE], {}, first.context_expr)
        return done[0]

    def _captured(self, value: Value, body: list[ast.stmt]) -> None:
        """with torch.cuda.graph(g): g keeps what stands in it, and does it again on what its tensors hold by then."""
        for obj in value.refs:
            for graph in obj.slots["#graph"].refs if obj.data == "capture" else ():
                self.heap.set(graph, "#captured", (self.frame, body))

    def replayed(self, obj: Obj) -> Value:
        """g.replay()"""
        then, body = obj.slots["#captured"]
        frame = Frame(then.obj, then.script, then.globals, then.closure, then.node, then.owner, then.outside)
        self.frames.append(frame)
        try:
            self.block(body)
        finally:
            self.frames.pop()
        return NONE

    def enter(self, value: Value, node: ast.expr) -> Value:
        """What a context gives that somebody enters by hand."""
        managers = sorted((obj for obj in value.refs if obj.kind == "instance"), key=lambda each: each.number)
        return self._entered(value, managers, node)

    def _entered(self, value: Value, managers: list[Obj], node: ast.expr) -> Value:
        """What `as` gives a name to."""
        entered = value
        for obj in managers:
            found = self.find(obj.data, "__enter__")
            if found is not None:
                entered = self.call(self.bound(found[0], self.ref(obj), obj.data), [], {}, node)
        for obj in value.refs:
            if obj.kind == "generator":
                entered = self.element_of(obj)
        return entered

    def _entered_by_yield(self, node: ast.expr, inside: Callable[[Value], None]) -> Value:
        """The context expression; where it calls a @contextmanager of the script, the body is walked at its yield."""
        depth = len(self.frames)

        def at_yield(value: Value) -> None:
            above = self.frames[depth:]
            del self.frames[depth:]
            try:
                inside(value)
            finally:
                self.frames.extend(above)

        if not isinstance(node, ast.Call):
            return self.evaluate(node)
        outer = self.entering.get(id(node))
        self.entering[id(node)] = at_yield
        try:
            return self.evaluate(node)
        finally:
            self.entering.pop(id(node), None)
            if outer is not None:
                self.entering[id(node)] = outer


__all__ = ["Contexts"]
