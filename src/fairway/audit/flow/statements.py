"""Statements: assignments, branches, loops, definitions."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import Part
from fairway.audit.flow.loops import Loops
from fairway.audit.flow.patterns import Bound
from fairway.audit.flow.values import CAPPED, GRAD, MISSING, NO_TOKENS, NOTHING, ORDERED, RANKED, Value, blend
from fairway.audit.reading.tree import nodes
from fairway.audit.verdict import Place


class Statements(Loops):
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
            if self.control:
                value = self._chosen_from(value, self.chosen)
                held = self.flat(value)
                if held.states and not held.toks and not held.losses:  # weights, of a checkpoint
                    self.trace.weighed |= self.chosen
            if self.swayed and self.plain(value) and not value.toks and isinstance(value.const, (int, float)):
                value = value.but(const=MISSING, toks=frozenset().union(*self.swayed))  # best = candidate
            self.heap.set(self.scope(target.id), target.id, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target.elts, value)
        elif isinstance(target, ast.Attribute):
            self.put(self.evaluate(target.value), target.attr, value, target)
        elif isinstance(target, ast.Subscript):
            base = self.evaluate(target.value)
            parts = self.parts(target.slice)
            named = self.frame.views.get(target.value.id) if isinstance(target.value, ast.Name) else None
            view = named or target.value
            if not base.refs and isinstance(view, ast.Subscript):  # x[1:][mask] = v, x[row][:n] = v, part[:] = v
                base, parts = self._seen_through(view, parts)
            if base.refs:
                self.put_item(base, parts, value, target)
            elif isinstance(target.value, (ast.Name, ast.Attribute)) and base is not NOTHING:
                entry = self.flat(value)
                if any(not part.slice or self.slice_spans(part) for part in parts):  # else the same place in each turn
                    entry = self.earlier_dropped(entry)
                self.assign(target.value, blend(self.flat(base), entry).but(const=MISSING))
        elif isinstance(target, ast.Starred):
            self.assign(target.value, value)

    def _seen_through(self, view: ast.Subscript, parts: list[Part]) -> tuple[Value, list[Part]]:
        """The tensor that a part of it is written into, and the index of what is written."""
        base = self.evaluate(view.value)
        tensors = all(obj.kind == "tensor" for obj in base.refs)
        return (base, [*self.parts(view.slice), *parts]) if base.refs and tensors else (NOTHING, parts)

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
        for target in targets:  # `*rest` is a list of such elements again
            self.assign(target, value if isinstance(target, ast.Starred) else self._row_of_its_own(elements.any))

    def _row_of_its_own(self, row: Value) -> Value:
        """`a, b = torch.zeros(2, 3)`: what is added to one row is not in the other."""
        empty = row.refs and all(
            obj.kind == "tensor" and obj.owner is None and "#leaf" not in obj.slots and not self.content(obj).toks
            for obj in row.refs
        )
        return self.copied(row) if empty and not row.items else row

    def _filled(self, target: ast.expr, source: ast.expr) -> Value | None:
        """`a, b, c = first, *rest`, where only the targets tell how many the rest are; None for all else."""
        if not isinstance(target, ast.Tuple) or not isinstance(source, ast.Tuple):
            return None
        stars = [each for each in source.elts if isinstance(each, ast.Starred)]
        more = len(target.elts) - len(source.elts) + 1
        if len(stars) != 1 or more < 1 or any(isinstance(each, ast.Starred) for each in target.elts):
            return None
        items: list[Value] = []
        for each in source.elts:
            value = self.evaluate(each)
            if not isinstance(each, ast.Starred):
                items.append(value)
                continue
            elements = self.elements(value, each)
            rest = elements.exact
            items += rest if rest is not None else [self._row_of_its_own(elements.any) for _ in range(more)]
        return Value(items=tuple(items))

    def _do_Assign_(self, node: ast.Assign) -> None:
        filled = self._filled(node.targets[0], node.value) if len(node.targets) == 1 else None
        value = self.evaluate(node.value) if filled is None else filled
        for target in node.targets:
            kept = value
            if isinstance(target, ast.Attribute) and self.nest and self._moves(target, node.value):
                kept = self._advanced(target, value)
            self.assign(target, kept)
            if isinstance(target, ast.Name):
                self.frame.views.pop(target.id, None)
                if isinstance(node.value, ast.Subscript) and not value.refs:
                    self.frame.views[target.id] = node.value

    def overwrite(self, target: ast.expr, value: Value) -> None:
        """What a name stands for is changed in place: a part of a tensor is, too, where the name is one of it."""
        self.assign(target, value)
        if isinstance(target, ast.Name) and target.id in self.frame.views:
            self.assign(self.frame.views[target.id], value)

    @staticmethod
    def _moves(target: ast.Attribute, source: ast.expr) -> bool:
        """self.pos = self.pos + n: a place in a stream that moves with each call."""
        return any(isinstance(each, ast.Attribute) and each.attr == target.attr for each in nodes(source))

    def _advanced(self, target: ast.Attribute, value: Value) -> Value:
        if not self.plain(value) or value.choices or isinstance(value.const, (str, bool)) or value.const is None:
            return value
        base = self.evaluate(target.value)
        born = min((obj.born for obj in base.refs), key=len, default=())
        ahead = {loop for loop, turn in self.nest for each, low, _ in value.spans if each == loop and low > turn}
        moved = tuple(span for span in self.since(born) if span[0] not in ahead)  # it is where the next turn begins
        return self.tagged(value, moved).but(const=MISSING)

    def _do_AnnAssign_(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.assign(node.target, self.evaluate(node.value))

    def _do_AugAssign_(self, node: ast.AugAssign) -> None:
        value = self.evaluate(node.value)
        target = node.target
        if isinstance(node.op, ast.Sub) and not value.flags & GRAD:
            self.book(value)  # nats -= log p, as `+=` books a loss
        if isinstance(target, ast.Subscript):
            base, parts = self.evaluate(target.value), self.parts(target.slice)
            self.quiet = True
            old = self.item(base, parts, target)
            self.quiet = False
            self._augmented_item(base, parts, old, value, node)
            return
        old = self.name(target.id) if isinstance(target, ast.Name) else self.evaluate(target)
        changed = self.changed_in_place(node.op, old, value, node)
        if changed is not None:
            if changed is not old:
                self.assign(target, changed)
            return
        result = self.binop(node.op, old, value, node)
        if isinstance(target, ast.Attribute) and self.nest:
            result = self._advanced(target, result)
        self.overwrite(target, result)

    def _augmented_item(self, base: Value, parts: list[Part], old: Value, value: Value, node: ast.AugAssign) -> None:
        if not base.refs:
            if isinstance(node.target, ast.Subscript) and isinstance(node.target.value, (ast.Name, ast.Attribute)):
                self.assign(node.target.value, self.binop(node.op, base, value, node))
            return
        given = self.flat(value)
        follows = given.flags & GRAD and given.toks  # the entry moves by a gradient: it is no use of it
        result = given if follows else self.binop(node.op, self.flat(old), value, None)
        self.put_item(base, parts, self._counted(base, result) if self.nest else result, node)

    def _counted(self, base: Value, value: Value) -> Value:
        """A number in a list or dict that each turn of a loop adds to: another one each time."""
        if not self.plain(value) or value.choices or isinstance(value.const, (str, bool)) or value.const is None:
            return value
        born = min((obj.born for obj in base.refs), key=len, default=())
        return self.tagged(value, self.since(born)).but(const=MISSING)

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
        if held and isinstance(node.body[-1], ast.Raise):
            held = False  # a check, which the script that scores has passed
        if held is not None:
            return self.block(node.body if held else node.orelse)
        if picks and self.frame.loops:
            return self._picking(test, node)
        alive = self.branch(test, lambda: self._through(node), lambda: self.block(node.orelse), node)
        if alive and isinstance(node.test, ast.UnaryOp) and isinstance(node.body[-1], (ast.Continue, ast.Return)):
            self.narrow(node.test.operand)  # if not name.startswith("fineweb_val_"): continue
        return alive

    def _through(self, node: ast.If) -> bool:
        """The branch that a test lets through; what the test says of a file's name holds in it alone."""
        before = self.narrow(node.test) if not isinstance(node.test, ast.UnaryOp) else {}
        narrowed = {name: self.name(name) for name in before}
        alive = self.block(node.body)
        for name, old in before.items():
            if alive and self.name(name) is narrowed[name]:
                self.assign(ast.Name(name, ast.Store()), old)
        return alive

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
        guarded = bool(test.env - RANKED - ORDERED)
        if guarded:
            self.guards.append(self.place(node))
        asked = self.flat(test)
        self.asked.append(asked.toks if asked.raw else NO_TOKENS)
        sways = bool(asked.toks) and not asked.raw and not test.choices and bool(asked.states)
        if sways:
            self.swayed.append(asked.toks)
        try:
            return self.fork(branches)
        finally:
            self.asked.pop()
            if sways:
                self.swayed.pop()
            if capped:
                self.caps.pop()
            if test.choices:
                self.control.pop()
            if guarded:
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


def _every_nth(test: ast.expr) -> bool:
    """`if i % 4:`, `if i % 4 != 0:`, where both numbers are written out."""
    if isinstance(test, ast.Compare) and isinstance(test.comparators[0], ast.Constant):
        test = test.left
    if not (isinstance(test, ast.BinOp) and isinstance(test.op, ast.Mod)):
        return False
    return isinstance(test.right, ast.Constant) and not isinstance(test.right.value, str)
