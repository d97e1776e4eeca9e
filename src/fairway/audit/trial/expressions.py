"""Expressions, turned into closures once: `compiled(node)(frame)` is the value."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from fairway.audit.trial.arrays import Array
from fairway.audit.trial.displays import Displays
from fairway.audit.trial.host import Compute
from fairway.audit.trial.limits import limit_of
from fairway.audit.trial.operators import combine, contained, name_of, negated
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.values import UNKNOWN, Frame, Lib, Undecided, Unknown, Value


class Expressions(Displays):
    """host: the machine. Mixed into the compiler."""

    def compiled(self, node: ast.expr) -> Compute:
        made: Compute = getattr(self, f"_{type(node).__name__.lower()}", self._strange)(node)
        if id(node) not in self.host.handed_on or not isinstance(node, (ast.Tuple, ast.Call)):
            return made
        met, line = self.host.plans.met, node.lineno

        def handed(frame: Frame) -> Value:
            found = made(frame)
            met(line, found)
            return found

        return handed

    def _strange(self, node: ast.expr) -> Compute:
        return lambda frame: UNKNOWN

    def _constant(self, node: ast.Constant) -> Compute:
        value = node.value
        if type(value) is int:
            name = "vocab" if id(node) in self.host.widths else ""
            value = (self.host.limits.written(node) or self.host.limits.named(name)).get(value, value)
        return lambda frame: value

    def _name(self, node: ast.Name) -> Compute:
        name, find = node.id, self.host.name

        def named(frame: Frame) -> Value:
            held = frame.vars  # half of all names are a function's own
            return held[name] if name in held and not frame.elsewhere else find(frame, name)

        return self._taken(named, name)

    def _attribute(self, node: ast.Attribute) -> Compute:
        value, name, find = self.compiled(node.value), node.attr, self.host.attribute
        return self._taken(lambda frame: find(value(frame), name), name)

    def _taken(self, compute: Compute, name: str) -> Compute:
        """A name, which may stand for a number that is taken for another."""
        forced, used = self.host.limits.named(name), self.host.limits.taken
        if not forced:
            return compute

        def taken(frame: Frame) -> Value:
            found = compute(frame)
            if type(found) is not int or found not in forced:
                return found
            used.add((found, forced[found]))
            return forced[found]

        return taken

    def _as_it_stands(self, node: ast.expr) -> Compute:
        """A setting or a number that is taken for no other."""
        if isinstance(node, ast.Attribute):
            value, name, find = self.compiled(node.value), node.attr, self.host.attribute
            return lambda frame: find(value(frame), name)
        held = node.value if isinstance(node, ast.Constant) else None
        return lambda frame: held

    def _subscript(self, node: ast.Subscript) -> Compute:
        value, index, find = self.compiled(node.value), self.compiled(node.slice), self.host.item
        end = _end_of(node.slice)
        site = limit_of(end) if end is not None and self._once(node) else None
        if site is not None:
            held_against = self.host.limits.held_against

            def begun(frame: Frame) -> Value:
                whole, part = value(frame), index(frame)
                if isinstance(whole, (list, tuple, Array)) and isinstance(part.stop, int) and part.stop > 0:
                    held_against(site, len(whole), part.stop)
                return find(whole, part)

            return begun
        return lambda frame: find(value(frame), index(frame))

    def _slice(self, node: ast.Slice) -> Compute:
        parts = [self.compiled(part) if part is not None else None for part in (node.lower, node.upper, node.step)]
        return lambda frame: slice(*[None if part is None else part(frame) for part in parts])

    def _binop(self, node: ast.BinOp) -> Compute:
        taken = self.host.limits.at(node)
        if taken is not None:
            return lambda frame: taken
        left, right, name = self.compiled(node.left), self.compiled(node.right), name_of(node.op)
        weigh, shown, line = self.host.weigh, self.host.shown, node.lineno
        bend = self.host.bend
        cut = self.host.cut if name == "FloorDiv" else None
        ramp = self.host.ramp if name == "Div" and _is_ramp(node) else None

        def worked(frame: Frame) -> Value:
            one, other = left(frame), right(frame)
            if cut is not None:
                cut(one, other)
            if ramp is not None:
                other = ramp(one, other)
            if name == "Mod" and isinstance(one, str):
                for each in other if isinstance(other, tuple) else (other,):
                    shown(each, line)
                return one
            if name == "Mult" and isinstance(other, Unknown) and isinstance(one, Array) and one.lossy:
                self.host.blur()
            found = combine(name, one, other)
            if isinstance(found, Array):
                weigh(found)
                if found.lossy and any(map(_in_columns, (one, other))) and found.shape[-1] > 1:
                    bend(line)  # one price for each byte of a token
            return found

        return worked

    def _unaryop(self, node: ast.UnaryOp) -> Compute:
        value, name, truth = self.compiled(node.operand), name_of(node.op), self.host.truth
        if name == "Not":

            def refused(frame: Frame) -> Value:
                found = value(frame)
                try:
                    return not truth(found)
                except Undecided:
                    return UNKNOWN

            return refused
        return lambda frame: negated(name, value(frame))

    def _boolop(self, node: ast.BoolOp) -> Compute:
        parts, truth = [self.compiled(each) for each in node.values], self.host.truth
        stops = isinstance(node.op, ast.Or)

        def joined(frame: Frame) -> Value:
            found: Value = None
            unsure = False
            for part in parts:
                found = part(frame)
                try:
                    if truth(found) is stops:
                        return found
                except Undecided:
                    unsure = True
            return UNKNOWN if unsure else found

        return joined

    def _compare(self, node: ast.Compare) -> Compute:
        compiled = self._as_it_stands if _among_settings(node) else self.compiled
        first = compiled(node.left)
        rest = [(name_of(op), compiled(each)) for op, each in zip(node.ops, node.comparators, strict=True)]
        truth, held_against, is_set, line = self.host.truth, self.host.limits.held_against, self._is_set, node.lineno
        sides = [limit_of(each) for each in (node.left, *node.comparators)]

        def compared(frame: Frame) -> Value:
            left = first(frame)
            found: Value = True
            for (name, part), one, other in zip(rest, sides, sides[1:], strict=False):
                right = part(frame)
                if name in _SIZES:
                    held_against(one, right, left)
                    held_against(other, left, right)
                asked = isinstance(right, Lib) and right.path == "os.environ" and name in ("In", "NotIn")
                found = is_set(name, left, line) if asked else _compared(name, left, right)
                if len(rest) > 1:
                    try:
                        if not truth(found):
                            return False
                    except Undecided:
                        return UNKNOWN
                left = right
            return found

        return compared

    def _is_set(self, name: str, variable: Value, line: int) -> Value:
        """variable in os.environ; variable not in os.environ"""
        held = self.host.call(Lib("os.environ.get"), (variable,), {}, line)
        return UNKNOWN if isinstance(held, Unknown) else (held is not None) == (name == "In")

    def _ifexp(self, node: ast.IfExp) -> Compute:
        test, one, other = self.compiled(node.test), self.compiled(node.body), self.compiled(node.orelse)
        truth, doubt, line = self.host.truth, self.host.doubt, node.lineno

        def chosen(frame: Frame) -> Value:
            try:
                return one(frame) if truth(test(frame)) else other(frame)
            except Undecided:
                doubt(line)
                return _either(one(frame), other(frame))

        return chosen

    def _call(self, node: ast.Call) -> Compute:
        func, call, line = self.compiled(node.func), self.host.call, node.lineno
        args = [
            (
                isinstance(arg, ast.Starred),
                self.compiled(getattr(arg, "value", arg) if isinstance(arg, ast.Starred) else arg),
            )
            for arg in node.args
        ]
        kwargs = [(each.arg, self.compiled(each.value)) for each in node.keywords]
        items = self.host.items
        least = self._least(node)

        def called(frame: Frame) -> Value:
            what = func(frame)
            given: list[Value] = []
            for starred, arg in args:
                given.extend(items(arg(frame))) if starred else given.append(arg(frame))
            named: dict[str, Value] = {}
            for key, value in kwargs:
                found = value(frame)
                if key is not None:
                    named[key] = found
                elif isinstance(found, dict):  # a key that nobody knows names no parameter
                    named.update((name, each) for name, each in found.items() if isinstance(name, str))
            if least is not None:
                least(*given)
            return call(what, tuple(given), named, line)

        return called

    def _least(self, node: ast.Call) -> Callable[[Value, Value], None] | None:
        """min(found, most): what is found is held against the most; None of other calls."""
        is_min = isinstance(node.func, ast.Name) and node.func.id == "min" and not node.keywords
        if not is_min or len(node.args) != 2 or not self._once(node):
            return None
        (one, other), held_against = [limit_of(each) for each in node.args], self.host.limits.held_against

        def seen(left: Value, right: Value) -> None:
            held_against(one, right, left)
            held_against(other, left, right)

        return seen

    def _once(self, node: ast.expr) -> bool:
        return id(node) not in self.host.looped

    def _lambda(self, node: ast.Lambda) -> Compute:
        return self.function(node, node.args, "lambda", None)

    def function(self, node: ast.AST, args: ast.arguments, name: str, body: Any) -> Compute:
        raise NotImplementedError

    def _namedexpr(self, node: ast.NamedExpr) -> Compute:
        value, name = self.compiled(node.value), node.target.id

        def bound(frame: Frame) -> Value:
            found = value(frame)
            frame.bind(name, found)
            return found

        return bound

    def _starred(self, node: ast.Starred) -> Compute:
        return self.compiled(node.value)


def _in_columns(value: Value) -> bool:
    """Losses with a last axis of length one."""
    return isinstance(value, Array) and value.lossy and value.body.ndim > 1 and value.shape[-1] == 1


def _is_ramp(node: ast.BinOp) -> bool:
    """seen / (seen + 200_000): a share that grows with what was seen."""
    whole = node.right
    if not isinstance(whole, ast.BinOp) or not isinstance(whole.op, ast.Add):
        return False
    return ast.dump(node.left) in (ast.dump(whole.left), ast.dump(whole.right))


def _end_of(index: ast.expr) -> ast.expr | None:
    """n of [:n] and [0:n]."""
    if not isinstance(index, ast.Slice) or index.step is not None:
        return None
    begins = index.lower is None or (isinstance(index.lower, ast.Constant) and index.lower.value == 0)
    return index.upper if begins else None


_SIZES = frozenset(("Lt", "LtE", "Gt", "GtE"))


def _among_settings(node: ast.Compare) -> bool:
    """`0 < args.stride < args.seq_len`: settings are held against each other as they are, whatever they are taken for
    elsewhere; in a short text both may come to the same."""
    sides = (node.left, *node.comparators)
    named = [each for each in sides if not isinstance(each, ast.Constant)]
    owners = [each.value.id for each in named if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name)]
    return len(owners) == len(named) > 1 and len(set(owners)) == 1 and owners[0] != "self"  # a counter and its end


def _compared(name: str, left: Value, right: Value) -> Value:
    if name in ("Is", "IsNot"):
        if isinstance(left, Unknown) or isinstance(right, Unknown):
            return UNKNOWN if left is not None and right is not None else name == "IsNot"
        same = left is right or (isinstance(left, (bool, type(None), int, str)) and left == right)
        return same if name == "Is" else not same
    if name in ("In", "NotIn"):
        found = contained(left, right)
        return found if isinstance(found, Unknown) or name == "In" else not found
    return combine(name, left, right)


def _either(one: Value, other: Value) -> Value:
    """What a condition that nobody knows chooses: what is known of the two, where only one is."""
    for value in (one, other):
        if isinstance(value, (Array, Sum)):
            return value
    return one if isinstance(other, Unknown) or one is None else other if one is UNKNOWN else one


__all__ = ["Expressions"]
