"""Loops, and the ways out of them and of functions."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from fairway.audit.flow.core import Loop
from fairway.audit.flow.definitions import Definitions
from fairway.audit.flow.indices import Elements
from fairway.audit.flow.iteration import is_option
from fairway.audit.flow.values import CLAIMED, LENGTH, MISSING, NONE, Value
from fairway.audit.reading.tree import nodes, own


class Loops(Definitions):
    """A loop is walked twice: its first iteration and a later one."""

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
        if _takes_gradients(node):
            self._grown_in(node)
        through = self.evaluate(node.iter)
        elements = self.elements(through, node)
        if elements.count == 0:
            return self.block(node.orelse)
        turns = self._turns(elements)
        if self.forwards and len(turns) > 1 and not _learns(node):  # layers: one stands for all
            turns = turns[:1] if elements.exact is None else turns
        loop = self.loop_id(node)
        self.turns[loop] = elements.count if elements.count is not None else 2
        written = ast.unparse(node.iter.args[-1]) if isinstance(node.iter, ast.Call) and node.iter.args else ""
        for obj in through.refs:
            if obj.kind == "range":
                self.ends[loop] = obj.data[1].sym, written
        shared = elements.exact is not None and _shared(elements.exact)
        if _strides(node.iter):
            self.strided.add(loop)
        if _backwards(node.iter):
            self.backwards.add(loop)

        def start(turn: int) -> None:
            element = turns[turn - 1]
            kept = self.turned(element, loop, turn)
            if elements.exact is not None and (element.const is not MISSING or shared or is_option(element)):
                kept = element
            if elements.counted:
                kept = kept.but(const=elements.first if turn == 1 else elements.last)
            self.assign(node.target, kept)

        return self._walk(node, loop, len(turns), start)

    _do_AsyncFor_ = _do_For_

    def _grown_in(self, node: ast.For) -> None:
        """What a container holds takes gradients from here on: tensors of which nothing is known but that they are."""
        called = node.iter.func if isinstance(node.iter, ast.Call) else None
        of_dict = isinstance(called, ast.Attribute) and called.attr in ("values", "items")
        source = called.value if isinstance(called, ast.Attribute) and of_dict else node.iter
        if not isinstance(source, (ast.Name, ast.Attribute)):
            return
        for obj in self.evaluate(source).refs:
            for key, held in list(obj.slots.items()) if obj.kind in ("dict", "list") else ():
                if not isinstance(held, Value) or not (isinstance(key, tuple) or key in ("#elem", "#items")):
                    continue
                if held.items is not None:
                    self.heap.set(obj, key, held.but(items=tuple(self._leaf(each, node) for each in held.items)))
                else:
                    self.heap.set(obj, key, self._leaf(held, node))

    def _leaf(self, held: Value, node: ast.AST) -> Value:
        for obj in held.refs:
            if obj.kind == "tensor":
                self.grow(obj)
        known = held.refs or held.items is not None or held.const is not MISSING
        return held if known or held.toks or held.states or held.losses else self.grown(held, node)

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
        if alive and node.orelse and not record.broke:  # of the turns that no break left: it may raise
            alive = self.block(node.orelse)
        came = alive or record.broke or bool(record.breaks)
        if record.breaks:
            self.settle(record.breaks, alive or record.broke)
        if record.chosen:
            for update in self.trace.updates[before:]:
                if update.state is not None:
                    root = update.state.root
                    self.heap.set(root, "#choices", root.slots.get("#choices", 0) | record.chosen)
        return came

    def _drift(self, names: frozenset[str], loop: int, turn: int) -> None:
        """Numbers that the loop's body changes differ from one iteration to the next."""
        slots = self.frame.obj.slots
        for name in names:
            value = slots.get(name)
            if not isinstance(value, Value) or not self.plain(value) or value.choices:
                continue
            number = isinstance(value.const, (int, float)) and not isinstance(value.const, bool)
            if number or (value.const is MISSING and (value.spans or value.flags & CLAIMED)):
                spans = tuple((each, a, b) for each, a, b in value.spans if each != loop)
                spans = tuple(sorted((*spans, (loop, turn, turn))))
                drifted = value.but(
                    spans=spans, const=MISSING, unit=value.unit, limit=None, flags=value.flags & ~LENGTH
                )
                self.heap.set(self.frame.obj, name, drifted)


def _strides(source: ast.expr) -> bool:
    """range(0, n, 4 * chunk): from 0, in steps with a number written out, so that it is no share of a rank."""
    if not (isinstance(source, ast.Call) and len(source.args) == 3 and isinstance(source.args[0], ast.Constant)):
        return False
    step = source.args[2]
    parts = [step.left, step.right] if isinstance(step, ast.BinOp) and isinstance(step.op, ast.Mult) else [step]
    return any(isinstance(each, ast.Constant) and isinstance(each.value, int) and each.value > 1 for each in parts)


def _backwards(source: ast.expr) -> bool:
    """reversed(...), range(n, 0, -1), x[::-1]"""
    if isinstance(source, ast.Call) and isinstance(source.func, ast.Name):
        step = source.args[2] if source.func.id == "range" and len(source.args) == 3 else None
        return source.func.id == "reversed" or _negative(step)
    sliced = isinstance(source, ast.Subscript) and isinstance(source.slice, ast.Slice)
    return sliced and _negative(source.slice.step)  # type: ignore[attr-defined]


def _negative(node: ast.expr | None) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


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
        names = {each.attr for each in nodes(node) if isinstance(each, ast.Attribute)}
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
                    names.update(part.id for part in nodes(target) if isinstance(part, ast.Name))
            if not isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
                waiting += ast.iter_child_nodes(each)
        if isinstance(node, ast.For):
            names -= {part.id for part in nodes(node.target) if isinstance(part, ast.Name)}
        cached = frozenset(names)
        node._fairway_assigned = cached
    return cached


__all__ = ["Loops", "changed"]


def _takes_gradients(node: ast.For) -> bool:
    """`for w in W.values(): w.requires_grad_(True)`, or `w.requires_grad = True`."""
    last = node.target.elts[-1] if isinstance(node.target, ast.Tuple) and node.target.elts else node.target
    name = last.id if isinstance(last, ast.Name) else ""
    for each in own(node.body):
        if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.func.attr == "requires_grad_":
            told = [arg.value for arg in each.args if isinstance(arg, ast.Constant)]
            if getattr(each.func.value, "id", "") == name and told != [False]:
                return True
        elif isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Attribute):
            about = each.targets[0].attr == "requires_grad" and getattr(each.targets[0].value, "id", "") == name
            if about and isinstance(each.value, ast.Constant) and each.value.value is True:
                return True
    return False
