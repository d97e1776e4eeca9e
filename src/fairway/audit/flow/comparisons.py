"""Comparisons: what decides a condition, what picks places of a window, what a clock is held against."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

from fairway.audit.flow import events
from fairway.audit.flow.containers import is_same
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import bound_of, sym_of
from fairway.audit.flow.iteration import Iteration
from fairway.audit.flow.tokens import ALL_BEFORE, Cut
from fairway.audit.flow.values import (
    CAPPED,
    CLOCK,
    FIRST,
    LATER,
    LENGTH,
    MASK,
    MISSING,
    NOTHING,
    POSITIONS,
    WEIGHTS,
    Value,
    blend,
)

_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Is: lambda a, b: a is b or a == b, ast.IsNot: lambda a, b: not (a is b or a == b),
}  # fmt: skip


class Comparisons(Iteration):
    """compare(op, left, right)"""

    def compare(self, op: ast.cmpop, left: Value, right: Value, node: ast.AST | None, texts: Any) -> Value:
        """left op right"""
        known = self._known(op, left, right, texts)
        if known is not None:
            return Value(const=known, env=left.env | right.env, choices=left.choices | right.choices)
        one, two = self.flat(left), self.flat(right)
        result = blend(one, two)
        if isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
            if (one.losses or two.losses) and not (_sign_of(one, two) or _sign_of(two, one)):
                result.choices |= self.choose("if", [left, right], node)
            if (one.flags ^ two.flags) & CLOCK:
                self._watch(one, two, node)
            result.cuts = result.cuts | self._positions(op, one, two, texts)
            self.picks = self.picks or _picks(one, two) or _picks(two, one)
        if self._caps(op, one, two):
            result.flags |= CAPPED
        if result.toks and not (one.flags ^ two.flags) & POSITIONS:  # beside positions it is a one-hot form
            result.flags |= MASK
        result.losses = 0
        result.flags &= ~(POSITIONS | LATER)
        return result

    @staticmethod
    def _caps(op: ast.cmpop, one: Value, two: Value) -> bool:
        """count >= 8_000_000, seconds > 550, now > deadline: a limit that the data do not set."""
        if not isinstance(op, (ast.Gt, ast.GtE)):
            return False
        if one.flags & CLOCK:
            return True
        number = isinstance(two.const, (int, float)) and not isinstance(two.const, bool) and two.const >= 1000
        counted = not one.flags & LENGTH or (bool(one.spans) and one.sym.startswith("add("))
        return number and one.const is MISSING and counted and not one.losses

    def _known(self, op: ast.cmpop, left: Value, right: Value, texts: Any) -> bool | None:
        if isinstance(op, (ast.In, ast.NotIn)):
            found = self.contains(left, right)
            return None if found is None else found is isinstance(op, ast.In)
        if left.const is not MISSING and right.const is not MISSING and not left.refs and not right.refs:
            try:
                return bool(_ORDER[type(op)](left.const, right.const))
            except Exception:
                return None
        if isinstance(op, (ast.Is, ast.IsNot)) and _named(left) and _named(right):
            return (left.refs == right.refs) is isinstance(op, ast.Is)
        if right.const is None and not right.refs and isinstance(op, (ast.Is, ast.IsNot, ast.Eq, ast.NotEq)):
            there = bool(left.refs or left.toks or left.states or left.items or left.losses)
            grad = isinstance(texts[0], ast.Attribute) and texts[0].attr == "grad"
            if there or grad or (left.const is not MISSING and left.const is not None):
                return isinstance(op, (ast.IsNot, ast.NotEq))
        return None

    def contains(self, key: Value, table: Value) -> bool | None:
        """key in table, where that is known. What was filled for all weights holds each of them."""
        if key.const is not MISSING and table.const is not MISSING and not table.refs:
            try:
                return key.const in table.const
            except Exception:
                return None
        if table.items is not None and all(item.const is not MISSING for item in table.items):
            if key.const is not MISSING:
                return any(item.const == key.const for item in table.items)
            return None
        if len(table.refs) == 1 and (known := self._in_list(key, *table.refs)) is not None:
            return known
        for obj in table.refs:
            if obj.kind == "foreign" and obj.data == "os.environ":
                held = self.setting(key, Value(const=None))
                return None if held.const is MISSING else held.const is not None
            if obj.kind == "dict" and not obj.slots.get("#learned"):
                if ("k", key.const) in obj.slots and key.const is not MISSING:
                    return True
                held = obj.slots.get("#elem", NOTHING)
                if held.flags & WEIGHTS or self.flat(held).flags & WEIGHTS:
                    return True
        return None

    def _in_list(self, key: Value, obj: Obj) -> bool | None:
        """Whether an object or a constant is in a list whose elements are known one by one."""
        exact = self.listed(obj) if obj.kind == "list" else None
        plain = key.const is not MISSING or len(key.refs) == 1
        if exact is None or not plain or not all(each.const is not MISSING or len(each.refs) == 1 for each in exact):
            return None
        return any(is_same(each, key) for each in exact)

    def _watch(self, one: Value, two: Value, node: ast.AST | None) -> None:
        clock, other = (one, two) if one.flags & CLOCK else (two, one)
        scale, lead = clock.lead
        limit = None
        if isinstance(other.const, (int, float)) and not isinstance(other.const, bool) and scale:
            limit = (other.const - lead) / scale
        text = ast.unparse(node)[:100] if isinstance(node, ast.expr) else ""
        self.note(events.Clock, node, limit=limit, text=text)

    @staticmethod
    def _positions(op: ast.cmpop, one: Value, two: Value, texts: Any) -> frozenset[Cut]:
        """arange(T) < n: the head up to n; >= n: the tail from it."""
        if not (one.flags ^ two.flags) & POSITIONS:
            return frozenset()
        first = bool(one.flags & POSITIONS)
        bound, text = (two, texts[1]) if first else (one, texts[0])
        below = isinstance(op, (ast.Lt, ast.LtE)) is first
        name = sym_of(bound, text)
        if not name:
            return frozenset()
        end = bound_of(bound, name)
        if below and bound.flags & FIRST and (one if first else two).spans:  # places in the text, not in a window
            end = f"{ALL_BEFORE}{end}"
        return frozenset((("head" if below else "tail", end, bound.less),))


def _picks(value: Value, bound: Value) -> bool:
    """nll.mean() > 6.0, end - start < 32: a loss, or a distance between places that the data set, and a constant."""
    if not isinstance(bound.const, (int, float)) or isinstance(bound.const, bool) or bound.const <= 0:
        return False
    if value.losses:
        return True
    if value.flags & LENGTH:  # between two places that no loop computed; more than 256 is a window, whose last is short
        return re.fullmatch(r"sub\((\w+|or\(,.*\)),\w+\)", value.sym) is not None and 3 <= bound.const <= 256
    return bool(value.toks) and not value.states and bound.const >= 3


def _named(value: Value) -> bool:
    """Whether it is one thing that has its name from another library: int, torch.float32."""
    return len(value.refs) == 1 and all(obj.kind == "foreign" for obj in value.refs) and value.items is None


def _sign_of(value: Value, bound: Value) -> bool:
    """Whether only the sign of what looks like a loss is asked for, and it is no difference of two: a logit's."""
    return value.losses != 0 and not value.less and bound.const == 0 and not isinstance(bound.const, bool)
