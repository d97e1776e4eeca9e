"""Statements, turned into closures once: `block(nodes)(frame)` gives None, or how the block was left."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from fairway.audit.reading.kernels import Priced
from fairway.audit.reading.tree import nodes
from fairway.audit.trial.arrays import Array
from fairway.audit.trial.drawing import drawn
from fairway.audit.trial.expressions import Expressions
from fairway.audit.trial.host import Compute, Host
from fairway.audit.trial.launches import launch, launched
from fairway.audit.trial.operators import name_of
from fairway.audit.trial.patterns import fitting
from fairway.audit.trial.threads import Capture, Graph, Suppress
from fairway.audit.trial.turns import Turns
from fairway.audit.trial.values import BLANK, UNKNOWN, Class, Frame, Func, Lib, Obj, Raised, Undecided, Unknown, Value

Bind = Callable[[Frame, Value], None]


@dataclass(frozen=True)
class Left:
    """How a block was left before its end. how: break, continue, return."""

    how: str
    value: Value = None


_HELD = (ast.Name, ast.Attribute, ast.Subscript)
BREAK: Final = Left("break")
CONTINUE: Final = Left("continue")
Run = Callable[[Frame], Left | None]


class Machine(Host, Protocol):
    """What statements ask of the machine besides."""

    made: int
    handlers: int
    rows_made: int
    made_at: int
    kernels: dict[str, Priced]

    def mark(self, over: Value = None) -> Turns: ...
    def aimless(self, since: Turns) -> bool: ...
    def passed_over(self, error: Raised, node: ast.stmt, made: int) -> bool: ...
    def doubt(self, line: int) -> None: ...
    def assign_attribute(self, value: Value, name: str, new: Value) -> None: ...
    def assign_item(self, value: Value, index: Value, new: Value) -> None: ...
    def delete_item(self, value: Value, index: Value) -> None: ...
    def grown(self, name: str, old: Value, more: Value) -> Value: ...
    def enter(self, manager: Value) -> Value: ...
    def leave(self, manager: Value, error: Raised | None) -> bool: ...
    def imported(self, name: str, line: int) -> Value: ...
    def decorated(self, value: Value, decorator: Value, line: int) -> Value: ...
    def caught(self, error: Raised, kind: Value) -> bool: ...
    def call_function(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value: ...
    def foreign(self, func: Lib, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value: ...


class Statements(Expressions):
    """Mixed into the compiler. host: the machine."""

    host: Machine

    def block(self, nodes: list[ast.stmt]) -> Run:
        runs = [(self.statement(node), node) for node in nodes]
        host, step = self.host, self.host.step

        def run(frame: Frame) -> Left | None:
            for each, node in runs:
                step(node.lineno)
                made = host.made
                try:
                    left = each(frame)
                except Raised as error:
                    if not host.passed_over(error, node, made):
                        raise
                    _forget(node, frame)
                    continue
                if left is not None:
                    return left
            return None

        return run

    def statement(self, node: ast.stmt) -> Run:
        made: Run = getattr(self, f"_s_{type(node).__name__.lower()}", self._s_pass)(node)
        return made

    def _s_pass(self, node: ast.stmt) -> Run:
        return lambda frame: None

    def _s_expr(self, node: ast.Expr) -> Run:
        value, new = self.compiled(node.value), drawn(node.value)
        if new is not None:
            return self._drawn(value, new, node.lineno)
        kernel = launch(node.value, self.host.kernels)
        if kernel is not None:
            priced, given = kernel
            bind = [self.target(given[name]) for name in priced.losses if isinstance(given.get(name), _HELD)]
            logits, targets = (self.compiled(given[name]) for name in (priced.logits, priced.targets))
            return launched(logits, targets, bind, self.host.foreign, node.lineno)

        def run(frame: Frame) -> None:
            value(frame)

        return run

    def _drawn(self, value: Compute, new: ast.expr, line: int) -> Run:
        """A tensor that is filled with noise is one that nobody knows, like torch.randn(rows, width): the weights of a
        model that is none of a class would be some thirty million numbers."""
        held, bind, host = self.compiled(new), self.target(new), self.host

        def run(frame: Frame) -> None:
            value(frame)
            found = held(frame)
            if isinstance(found, Array) and found.pos is None and not found.lossy:
                host.rows_made, host.made_at = (found.shape[0] if found.shape else 0), line
                bind(frame, BLANK)

        return run

    def _s_return(self, node: ast.Return) -> Run:
        value = self.compiled(node.value) if node.value is not None else None
        return lambda frame: Left("return", value(frame) if value is not None else None)

    def _s_break(self, node: ast.Break) -> Run:
        return lambda frame: BREAK

    def _s_continue(self, node: ast.Continue) -> Run:
        return lambda frame: CONTINUE

    def _s_assign(self, node: ast.Assign) -> Run:
        value, targets = self.compiled(node.value), [self.target(each) for each in node.targets]

        def run(frame: Frame) -> None:
            found = value(frame)
            for bind in targets:
                bind(frame, found)

        return run

    def _s_annassign(self, node: ast.AnnAssign) -> Run:
        if node.value is None:
            return self._s_pass(node)
        value, bind = self.compiled(node.value), self.target(node.target)

        def run(frame: Frame) -> None:
            bind(frame, value(frame))

        return run

    def _s_augassign(self, node: ast.AugAssign) -> Run:
        loaded = ast.copy_location(_as_load(node.target), node.target)
        old, more, bind, name = (
            self.compiled(loaded),
            self.compiled(node.value),
            self.target(node.target),
            name_of(node.op),
        )
        host = self.host

        def run(frame: Frame) -> None:
            bind(frame, host.grown(name, old(frame), more(frame)))

        return run

    def target(self, node: ast.expr) -> Bind:
        host = self.host
        if isinstance(node, ast.Name):
            name = node.id
            return lambda frame, value: frame.bind(name, value)
        if isinstance(node, ast.Attribute):
            owner, attr = self.compiled(node.value), node.attr
            return lambda frame, value: host.assign_attribute(owner(frame), attr, value)
        if isinstance(node, ast.Subscript):
            container, index = self.compiled(node.value), self.compiled(node.slice)
            return lambda frame, value: host.assign_item(container(frame), index(frame), value)
        if isinstance(node, ast.Starred):
            return self.target(node.value)
        if isinstance(node, (ast.Tuple, ast.List)):
            return self._unpacked(node.elts)
        return lambda frame, value: None

    def _unpacked(self, nodes: list[ast.expr]) -> Bind:
        binds = [self.target(each) for each in nodes]
        star = next((n for n, each in enumerate(nodes) if isinstance(each, ast.Starred)), None)
        items = self.host.items

        def bind(frame: Frame, value: Value) -> None:

            if isinstance(value, Unknown):
                for each in binds:
                    each(frame, value)
                return
            found = list(items(value))
            if star is not None:
                after = len(binds) - star - 1
                found = [*found[:star], found[star : len(found) - after], *found[len(found) - after :]]
            if len(found) != len(binds):
                if any(isinstance(item, Unknown) for item in found):
                    found = [UNKNOWN] * len(binds)
                else:
                    raise Raised("ValueError", "unpacking")
            for each, item in zip(binds, found, strict=True):
                each(frame, item)

        return bind

    def _s_if(self, node: ast.If) -> Run:
        test, body, orelse = self.compiled(node.test), self.block(node.body), self.block(node.orelse)
        host, line = self.host, node.lineno
        leaves, other_raises = _only_leaves(node.body), bool(node.orelse) and _only_leaves(node.orelse)
        avoid = leaves and not other_raises

        def run(frame: Frame) -> Left | None:
            try:
                holds = host.truth(test(frame))
            except Undecided:
                host.doubt(line)
                holds = not avoid
            return body(frame) if holds else orelse(frame)

        return run

    def _s_while(self, node: ast.While) -> Run:
        test, body, orelse = self.compiled(node.test), self.block(node.body), self.block(node.orelse)
        host, line = self.host, node.lineno

        def run(frame: Frame) -> Left | None:
            since, unsure = host.mark(), False
            while not unsure:
                host.step()
                try:
                    if not host.truth(test(frame)):
                        return orelse(frame)
                except Undecided:
                    host.doubt(line)
                    unsure = True
                left = body(frame)
                if left is BREAK or host.aimless(since):
                    return None
                if left is not None and left is not CONTINUE:
                    return left
            return None

        return run

    def _s_for(self, node: ast.For) -> Run:
        source, bind, body, orelse = (
            self.compiled(node.iter),
            self.target(node.target),
            self.block(node.body),
            self.block(node.orelse),
        )
        host = self.host

        def run(frame: Frame) -> Left | None:
            over = source(frame)
            since = host.mark(over)
            for item in host.items(over):
                host.step()
                bind(frame, item)
                left = body(frame)
                if left is BREAK or host.aimless(since):
                    return None
                if left is not None and left is not CONTINUE:
                    return left
            return orelse(frame)

        return run

    _s_asyncfor = _s_for

    def _s_with(self, node: ast.With) -> Run:
        managers = [
            (self.compiled(each.context_expr), self.target(each.optional_vars) if each.optional_vars else None)
            for each in node.items
        ]
        body, host = self.block(node.body), self.host

        def run(frame: Frame, n: int = 0) -> Left | None:
            if n == len(managers):
                return body(frame)
            value, bind = managers[n]
            manager = value(frame)
            entered = host.enter(manager)
            if bind is not None:
                bind(frame, entered)
            if isinstance(manager, Capture) and isinstance(manager.graph, Graph):
                manager.graph.body = lambda: body(frame)
            holds_back = isinstance(manager, Suppress)
            host.handlers += holds_back
            try:
                left = run(frame, n + 1)
            except Raised as error:
                if host.leave(manager, error):
                    return None
                raise
            finally:
                host.handlers -= holds_back
            host.leave(manager, None)
            return left

        return run

    def _s_try(self, node: ast.Try) -> Run:
        body, orelse, final = self.block(node.body), self.block(node.orelse), self.block(node.finalbody)
        handlers = [
            (self.compiled(each.type) if each.type is not None else None, each.name, self.block(each.body))
            for each in node.handlers
        ]
        host = self.host

        def run(frame: Frame) -> Left | None:
            try:
                host.handlers += bool(handlers)
                try:
                    left = body(frame)
                finally:
                    host.handlers -= bool(handlers)
                if left is None:
                    left = orelse(frame)
            except Raised as error:
                left = handled(frame, error)
                ended = final(frame)
                return ended or left
            ended = final(frame)
            return ended or left

        def handled(frame: Frame, error: Raised) -> Left | None:
            for kind, name, act in handlers:
                if kind is None or host.caught(error, kind(frame)):
                    if name:
                        frame.bind(name, error)
                    return act(frame)
            final(frame)
            raise error

        return run

    def _s_raise(self, node: ast.Raise) -> Run:
        value = self.compiled(node.exc) if node.exc is not None else None

        def run(frame: Frame) -> None:
            found = value(frame) if value is not None else None
            if isinstance(found, Raised):
                raise found
            kind = found.name if isinstance(found, (Lib, Class)) else getattr(getattr(found, "kind", None), "name", "")
            raise Raised(kind or "Exception", found)

        return run

    def _s_assert(self, node: ast.Assert) -> Run:
        test, host = self.compiled(node.test), self.host

        def run(frame: Frame) -> None:
            try:
                if not host.truth(test(frame)):
                    raise Raised("AssertionError", node.lineno)
            except Undecided:
                return

        return run

    def _s_delete(self, node: ast.Delete) -> Run:
        parts = [
            (self.compiled(each.value), self.compiled(each.slice))
            for each in node.targets
            if isinstance(each, ast.Subscript)
        ]
        names = [each.id for each in node.targets if isinstance(each, ast.Name)]
        host = self.host

        def run(frame: Frame) -> None:
            for container, index in parts:
                host.delete_item(container(frame), index(frame))
            for name in names:
                frame.vars.pop(name, None)

        return run

    def _s_global(self, node: ast.Global) -> Run:
        def run(frame: Frame) -> None:
            for name in node.names:
                frame.elsewhere[name] = frame.top

        return run

    def _s_nonlocal(self, node: ast.Nonlocal) -> Run:
        def run(frame: Frame) -> None:
            for name in node.names:
                outer = frame.parent.find(name) if frame.parent is not None else None
                frame.elsewhere[name] = outer or frame.top

        return run

    def _s_import(self, node: ast.Import) -> Run:
        host = self.host

        def run(frame: Frame) -> None:
            for each in node.names:
                found = host.imported(each.name, node.lineno)
                root = each.name.split(".")[0]
                if each.asname is None and root != each.name and isinstance(found, Lib):
                    found = Lib(root)
                frame.bind(each.asname or root, found)

        return run

    def _s_importfrom(self, node: ast.ImportFrom) -> Run:
        host, source = self.host, node.module or ""

        def run(frame: Frame) -> None:
            module = host.imported(source, node.lineno)
            for each in node.names:
                if each.name == "*":
                    frame.vars.update(getattr(module, "vars", {}))
                elif isinstance(module, Lib):
                    frame.bind(each.asname or each.name, Lib(f"{source}.{each.name}"))
                else:
                    frame.bind(each.asname or each.name, host.attribute(module, each.name))

        return run

    def _s_match(self, node: ast.Match) -> Run:
        host = self.host
        subject = self.compiled(node.subject)
        cases = [
            (
                fitting(host, each.pattern, self.compiled),
                self.compiled(each.guard) if each.guard is not None else None,
                self.block(each.body),
            )
            for each in node.cases
        ]

        def run(frame: Frame) -> Left | None:
            value = subject(frame)
            for fits, guard, body in cases:
                if fits(frame, value) and (guard is None or host.truth(guard(frame))):
                    return body(frame)
            return None

        return run


def _forget(node: ast.stmt, frame: Frame) -> None:
    """The names that a statement would have bound are not known, nor are attributes: `self.heat = held["heat"]`."""
    for each in nodes(node):
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store) and each.id not in frame.vars:
            frame.bind(each.id, UNKNOWN)
        elif isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and isinstance(each.value, ast.Name):
            owner = frame.vars.get(each.value.id)
            if isinstance(owner, Obj):
                owner.vars.setdefault(each.attr, UNKNOWN)


def _as_load(node: ast.expr) -> ast.expr:
    if isinstance(node, ast.Name):
        return ast.Name(node.id, ast.Load())
    if isinstance(node, ast.Attribute):
        return ast.Attribute(node.value, node.attr, ast.Load())
    assert isinstance(node, ast.Subscript)
    return ast.Subscript(node.value, node.slice, ast.Load())


def _only_leaves(body: list[ast.stmt]) -> bool:
    """Whether a branch does nothing but leave: what a condition that nobody knows is not taken to do."""
    return bool(body) and isinstance(body[-1], (ast.Raise, ast.Break, ast.Continue, ast.Return))


__all__ = ["BREAK", "CONTINUE", "Bind", "Left", "Machine", "Run", "Statements"]
