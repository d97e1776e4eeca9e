"""Statements: assignments, branches, loops, definitions."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from fairway.audit.flow.containers import Elements, Part
from fairway.audit.flow.core import Loop
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.patterns import Bound, Patterns
from fairway.audit.flow.values import CAPPED, LENGTH, MISSING, NONE, NOTHING, Value, blend, join
from fairway.audit.verdict import Place


class Statements(Patterns):
    """block(body): False where nothing comes through."""

    def block(self, body: list[ast.stmt]) -> bool:
        return all(self.statement(each) for each in body)

    def statement(self, node: ast.stmt) -> bool:
        """Do one statement; False: what follows is not reached."""
        self.burn()
        self.frame.line = node.lineno
        handler: Callable[[Any], bool | None] | None = getattr(self, f"_do_{type(node).__name__}_", None)
        return handler(node) is not False if handler is not None else True

    # Assignment.
    def assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            if self.caps and value.const is True:  # stop = True
                value = value.but(flags=value.flags | CAPPED)
            if self.control and not isinstance(value.const, str):
                value = self._chosen_from(value, self.chosen)
            self.heap.set(self.scope(target.id), target.id, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target.elts, value)
        elif isinstance(target, ast.Attribute):
            self.put(self.evaluate(target.value), target.attr, value, target)
        elif isinstance(target, ast.Subscript):
            base = self.evaluate(target.value)
            parts = self.parts(target.slice)
            if base.refs:
                self.put_item(base, parts, value, target)
            elif isinstance(target.value, (ast.Name, ast.Attribute)) and base is not NOTHING:
                self.assign(target.value, blend(self.flat(base), self.flat(value)).but(const=MISSING))
        elif isinstance(target, ast.Starred):
            self.assign(target.value, value)

    def scope(self, name: str) -> Obj:
        """Where a name is bound."""
        frame = self.frame
        if name not in frame.outside:
            return frame.obj
        for each in frame.closure:
            if name in each.slots:
                return each
        return frame.globals

    def _unpack(self, targets: list[ast.expr], value: Value) -> None:
        elements = self.elements(value, None)
        exact = elements.exact
        if exact is None and value.items is not None and not value.refs:
            exact = value.items
        stars = [n for n, each in enumerate(targets) if isinstance(each, ast.Starred)]
        if exact is not None and not stars and len(exact) == len(targets):
            for target, item in zip(targets, exact, strict=True):
                self.assign(target, item)
            return
        if exact is not None and stars and len(exact) >= len(targets) - 1:
            star, after = stars[0], len(targets) - stars[0] - 1
            for target, item in zip(targets[:star], exact, strict=False):
                self.assign(target, item)
            rest = exact[star : len(exact) - after]
            self.assign(targets[star], Value(items=tuple(rest)))
            for target, item in zip(targets[star + 1 :], exact[len(exact) - after :], strict=False):
                self.assign(target, item)
            return
        for target in targets:
            self.assign(target, elements.any)

    def _do_Assign_(self, node: ast.Assign) -> None:
        value = self.evaluate(node.value)
        for target in node.targets:
            kept = value
            if isinstance(target, ast.Attribute) and self.nest and self._moves(target, node.value):
                kept = self._advanced(target, value)
            self.assign(target, kept)

    @staticmethod
    def _moves(target: ast.Attribute, source: ast.expr) -> bool:
        """self.pos = self.pos + n: a place in a stream that moves with each call."""
        return any(isinstance(each, ast.Attribute) and each.attr == target.attr for each in ast.walk(source))

    def _advanced(self, target: ast.Attribute, value: Value) -> Value:
        if not self.plain(value) or value.choices or isinstance(value.const, (str, bool)) or value.const is None:
            return value
        base = self.evaluate(target.value)
        born = min((obj.born for obj in base.refs), key=len, default=())
        return self.tagged(value, self.since(born)).but(const=MISSING)

    def _do_AnnAssign_(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.evaluate(node.value))

    def _do_AugAssign_(self, node: ast.AugAssign) -> None:
        value = self.evaluate(node.value)
        target = node.target
        if isinstance(target, ast.Subscript):
            base, parts = self.evaluate(target.value), self.parts(target.slice)
            self.quiet = True
            old = self.item(base, parts, target)
            self.quiet = False
            self._augmented_item(base, parts, old, value, node)
            return
        old = self.name(target.id) if isinstance(target, ast.Name) else self.evaluate(target)
        cells = [obj for obj in old.refs if obj.kind == "tensor" or "#module" in obj.slots]
        if cells and len(cells) == len(old.refs):
            name = {"Add": "add_", "Sub": "sub_"}.get(type(node.op).__name__, "mul_")
            self.in_place(name, [old, value], {}, node)
            return
        lists = [obj for obj in old.refs if obj.kind == "list"]
        if lists and isinstance(node.op, ast.Add):
            for obj in lists:
                self.list_method(obj, old, "extend", [value], node)
            return
        result = self.binop(node.op, old, value, node)
        if isinstance(target, ast.Attribute) and self.nest:
            result = self._advanced(target, result)
        self.assign(target, result)

    def _augmented_item(self, base: Value, parts: list[Part], old: Value, value: Value, node: ast.AugAssign) -> None:
        if not base.refs:
            if isinstance(node.target, ast.Subscript) and isinstance(node.target.value, (ast.Name, ast.Attribute)):
                self.assign(node.target.value, self.binop(node.op, base, value, node))
            return
        self.put_item(base, parts, self.binop(node.op, self.flat(old), value, None), node)

    def _do_Expr_(self, node: ast.Expr) -> None:
        self.evaluate(node.value)

    def _do_Assert_(self, node: ast.Assert) -> None:
        """For what its condition does: shards are read by `assert f.readinto(tokens.numpy()) == 2 * n`."""
        self.evaluate(node.test)

    def _do_Delete_(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name) and len(self.frame.marks) == 0:
                self.heap.drop(self.scope(target.id), target.id)

    # Branches.
    def _do_If_(self, node: ast.If) -> bool:
        outer, self.picks = self.picks, False
        test = self.evaluate(node.test)
        picks, self.picks = self.picks or bool(test.flags & CAPPED) or _every_nth(node.test), outer
        held = self.truth(test)
        if held is not None:
            return self.block(node.body if held else node.orelse)
        if not picks or not self.frame.loops:
            return self.branch(test, lambda: self.block(node.body), lambda: self.block(node.orelse), node)
        return self._picking(test, node)

    def _picking(self, test: Value, node: ast.If) -> bool:
        """A condition that may leave some of what a loop goes through out of its sums."""
        place, loop = self.place(node), self.frame.loops[-1]
        lasting: list[list[int]] = []  # for each branch that goes on: the losses that only it booked

        def run(body: list[ast.stmt]) -> bool:
            before, left = len(self.booked), loop.left
            alive = self.block(body)
            mine = self.booked[before:]
            if alive:
                lasting.append(mine)
            elif loop.left > left and not mine:
                skipping.append(place)
            return alive

        skipping: list[Place] = []
        alive = self.branch(test, lambda: run(node.body), lambda: run(node.orelse), node)
        if len(lasting) == 2 and bool(lasting[0]) != bool(lasting[1]):
            for bit in lasting[0] or lasting[1]:
                self.trace.picked[bit] = self.trace.picked[bit] or place
        if skipping and alive:
            loop.skips = loop.skips or place
        return alive

    def branch(self, test: Value, *branches_and_node: Any) -> bool:
        """Both branches of a condition that is not known."""
        *branches, node = branches_and_node
        capped = test.flags & CAPPED and self.nest
        if capped:
            self.caps.append(self.nest[-1][0])
        if test.choices:
            self.control.append(test.choices)
        if test.env:
            self.guards.append(self.place(node))
        try:
            return self.fork(branches)
        finally:
            if capped:
                self.caps.pop()
            if test.choices:
                self.control.pop()
            if test.env:
                self.guards.pop()

    def _do_Match_(self, node: ast.Match) -> bool:
        subject = self.evaluate(node.subject)
        tests = self.flat(subject)
        test = Value(choices=tests.choices, env=tests.env)
        branches: list[Callable[[], bool]] = []
        for case in node.cases:
            bound: Bound = {}
            held = self.matched(case.pattern, subject, bound)
            if held is False:
                continue
            if held and not branches:  # nothing before it can have matched
                self._bind_names(bound)
                guard = self.evaluate(case.guard) if case.guard is not None else Value(const=True)
                held = self.truth(guard)
                if held:
                    return self.block(case.body)
                if held is False:
                    continue
                test = blend(test, self.flat(guard))
            branches.append(lambda case=case, bound=bound: self._case(case, bound))  # type: ignore[misc]
            if held and case.guard is None:
                return self.branch(test, *branches, node)
        return self.branch(test, *branches, lambda: True, node) if branches else True

    def _bind_names(self, bound: Bound) -> None:
        for name, value in bound.items():
            self.assign(ast.Name(name, ast.Store()), value)

    def _case(self, case: ast.match_case, bound: Bound) -> bool:
        self._bind_names(bound)
        if case.guard is not None:
            self.evaluate(case.guard)
        return self.block(case.body)

    def _do_Try_(self, node: ast.Try) -> bool:
        if node.handlers:

            def body() -> bool:
                return self.block(node.body) and self.block(node.orelse)

            def handler(each: ast.ExceptHandler) -> bool:
                if each.name:
                    self.assign(ast.Name(each.name, ast.Store()), self._caught(each))
                return self.block(each.body)

            handlers: list[Callable[[], bool]] = [lambda each=each: handler(each) for each in node.handlers]  # type: ignore[misc]
            alive = self.fork([body, *handlers])
        else:
            alive = self.block(node.body) and self.block(node.orelse)
        if node.finalbody:
            finished = self.block(node.finalbody)
            return alive and finished
        return alive

    _do_TryStar_ = _do_Try_

    def _caught(self, handler: ast.ExceptHandler) -> Value:
        """What is caught: a generator's end carries what it returned."""
        if not (isinstance(handler.type, ast.Name) and handler.type.id == "StopIteration"):
            return NOTHING
        ended = self.new("thing", "stop", handler)
        ended.slots["value"] = self.stopped
        return self.ref(ended)

    def _do_With_(self, node: ast.With) -> bool:
        for item in node.items:
            value = self.evaluate(item.context_expr)
            entered = value
            for obj in value.refs:
                if obj.kind == "instance":
                    found = self.find(obj.data, "__enter__")
                    if found is not None:
                        entered = self.call(self.bound(found[0], self.ref(obj), obj.data), [], {}, node)
                elif obj.kind == "generator":
                    entered = self.element_of(obj)
            if item.optional_vars is not None:
                self.assign(item.optional_vars, entered)
        return self.block(node.body)

    _do_AsyncWith_ = _do_With_

    # Ways out.
    def _do_Return_(self, node: ast.Return) -> bool:
        value = self.evaluate(node.value) if node.value else NONE
        frame = self.frame
        if self.control:
            value = self._chosen_from(value, self.chosen)
        own = [loop for loop, _ in self.nest[len(self.nest) - len(frame.loops) :]]
        if any(loop in self.caps for loop in own):  # it leaves all loops of the function
            for loop in own:
                self.trace.broken.setdefault(loop, self.place())
        if frame.marks:
            frame.returns.append((value, self.heap.changes(frame.marks[0])))
        else:
            frame.value = value
        return False

    def _do_Raise_(self, node: ast.Raise) -> bool:
        return False

    def _leave(self, kind: str) -> bool:
        frame = self.frame
        if not frame.loops:
            return False
        loop = frame.loops[-1]
        loop.left += 1 if kind == "continue" else 0
        if kind == "break":
            loop.chosen |= self.chosen
            if self.nest and self.nest[-1][0] in self.caps:
                self.trace.broken.setdefault(self.nest[-1][0], self.place())
        if len(frame.marks) > loop.forks:
            changes = self.heap.changes(frame.marks[loop.forks])
            (loop.breaks if kind == "break" else loop.continues).append(changes)
        elif kind == "break":
            loop.broke = True
        else:
            loop.continues.append({})
        return False

    def _do_Break_(self, node: ast.Break) -> bool:
        return self._leave("break")

    def _do_Continue_(self, node: ast.Continue) -> bool:
        return self._leave("continue")

    # Loops.
    def _do_For_(self, node: ast.For) -> bool:
        elements = self.elements(self.evaluate(node.iter), node)
        if elements.count == 0:
            return self.block(node.orelse)
        turns = self._turns(elements)
        if self.forwards and len(turns) > 1 and not _learns(node):  # layers: one stands for all
            turns = turns[:1] if elements.exact is None else turns
        loop = self.loop_id(node)
        self.turns[loop] = elements.count if elements.count is not None else 2
        shared = elements.exact is not None and _shared(elements.exact)
        if _strides(node.iter):
            self.strided.add(loop)

        def start(turn: int) -> None:
            element = turns[turn - 1]
            kept = self.turned(element, loop, turn)
            if elements.exact is not None and (element.const is not MISSING or shared):
                kept = element
            if elements.counted:
                kept = kept.but(const=elements.first if turn == 1 else elements.last)
            self.assign(node.target, kept)

        return self._walk(node, loop, len(turns), start)

    _do_AsyncFor_ = _do_For_

    @staticmethod
    def _turns(elements: Elements) -> list[Value]:
        if elements.exact is not None:
            return list(elements.exact)
        return [elements.any] * (1 if elements.count == 1 else 2)

    def _do_While_(self, node: ast.While) -> bool:
        loop = self.loop_id(node)
        if self.truth(self.evaluate(node.test)) is False:
            return self.block(node.orelse)

        def start(turn: int) -> None:
            if turn > 1:
                self.evaluate(node.test)

        return self._walk(node, loop, 2, start)

    def _walk(self, node: Any, loop: int, turns: int, start: Callable[[int], None]) -> bool:
        """The first iteration and a later one."""
        frame = self.frame
        record = Loop(len(frame.marks))
        frame.loops.append(record)
        before = len(self.trace.updates)
        alive = True
        moving = changed(node)
        for turn in range(1, turns + 1):
            self.nest.append((loop, turn))
            self._drift(moving, loop, turn)
            record.skips = None
            start(turn)
            if isinstance(node, ast.While) and turn == 1:
                self.evaluate(node.test)
            alive = self.block(node.body)
            if record.continues:
                self.settle([each for each in record.continues if each], alive or {} in record.continues)
                record.continues.clear()
                alive = True
            self.nest.pop()
            if not alive:
                break
        frame.loops.pop()
        came = alive or record.broke or bool(record.breaks)
        if record.breaks:
            self.settle(record.breaks, alive or record.broke)
        if record.chosen:
            for update in self.trace.updates[before:]:
                if update.state is not None:
                    root = update.state.root
                    self.heap.set(root, "#choices", root.slots.get("#choices", 0) | record.chosen)
        if came and alive and node.orelse and not record.broke:
            return self.block(node.orelse)
        return came

    def _drift(self, names: frozenset[str], loop: int, turn: int) -> None:
        """Numbers that the loop's body changes differ from one iteration to the next."""
        slots = self.frame.obj.slots
        for name in names:
            value = slots.get(name)
            if not isinstance(value, Value) or not self.plain(value) or value.choices:
                continue
            number = isinstance(value.const, (int, float)) and not isinstance(value.const, bool)
            if number or (value.const is MISSING and value.spans):
                spans = tuple((each, a, b) for each, a, b in value.spans if each != loop)
                spans = tuple(sorted((*spans, (loop, turn, turn))))
                drifted = value.but(
                    spans=spans, const=MISSING, unit=value.unit, limit=None, flags=value.flags & ~LENGTH
                )
                self.heap.set(self.frame.obj, name, drifted)

    # Definitions.
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


def _strides(source: ast.expr) -> bool:
    """range(0, n, 4 * chunk): from 0, in steps with a number written out, so that it is no share of a rank."""
    if not (isinstance(source, ast.Call) and len(source.args) == 3 and isinstance(source.args[0], ast.Constant)):
        return False
    step = source.args[2]
    parts = [step.left, step.right] if isinstance(step, ast.BinOp) and isinstance(step.op, ast.Mult) else [step]
    return any(isinstance(each, ast.Constant) and isinstance(each.value, int) and each.value > 1 for each in parts)


def _every_nth(test: ast.expr) -> bool:
    """`if i % 4:`, `if i % 4 != 0:`, where both numbers are written out."""
    if isinstance(test, ast.Compare) and isinstance(test.comparators[0], ast.Constant):
        test = test.left
    if not (isinstance(test, ast.BinOp) and isinstance(test.op, ast.Mod)):
        return False
    return isinstance(test.right, ast.Constant) and not isinstance(test.right.value, str)


def _shared(elements: tuple[Value, ...]) -> bool:
    """Whether two elements of a list hold the same tokens: `[("score", x, y), ("learn", x, y)]`."""
    seen: set[int] = set()
    for each in elements:
        own = {id(value) for value in _held_tokens(each, 3)}
        if own & seen:
            return True
        seen |= own
    return False


def _held_tokens(value: Value, deep: int) -> list[Value]:
    found = [value] if value.toks and not value.losses else []
    if deep:
        for item in value.items or ():
            found += _held_tokens(item, deep - 1)
        for obj in value.refs:
            for held in list(obj.slots.values())[:40] if obj.kind in ("instance", "list", "dict") else ():
                found += _held_tokens(held, deep - 1) if isinstance(held, Value) else []
    return found


def _learns(node: Any) -> bool:
    """Whether a loop's body takes gradients or steps."""
    cached = getattr(node, "_fairway_learns", None)
    if cached is None:
        names = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
        cached = bool(names & {"backward", "step", "grad"})
        node._fairway_learns = cached
    return bool(cached)


def changed(node: Any) -> frozenset[str]:
    """The names that a loop's body changes by themselves: `n += 1`, `n = n + 1`, `a, b = b, c`."""
    cached = getattr(node, "_fairway_assigned", None)
    if cached is None:
        names: set[str] = set()
        waiting: list[ast.AST] = list(node.body)
        while waiting:
            each = waiting.pop()
            if isinstance(each, ast.AugAssign) and isinstance(each.target, ast.Name):
                names.add(each.target.id)
            elif isinstance(each, ast.Assign):
                for target in each.targets:
                    names.update(part.id for part in ast.walk(target) if isinstance(part, ast.Name))
            if not isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
                waiting += ast.iter_child_nodes(each)
        if isinstance(node, ast.For):
            names -= {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
        cached = frozenset(names)
        node._fairway_assigned = cached
    return cached


__all__ = ["NONE", "Statements", "changed", "join"]
