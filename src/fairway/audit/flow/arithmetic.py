"""Operators: what a result comes from, and how a number of loops was computed."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from fairway.audit.flow import events
from fairway.audit.flow.comparisons import Comparisons
from fairway.audit.flow.indices import sym_of
from fairway.audit.flow.tokens import Span, merged_spans
from fairway.audit.flow.values import (
    CLOCK,
    GRAD,
    HEATED,
    INDEXED,
    LENGTH,
    MASK,
    MISSING,
    MOVED,
    NUMBER,
    ONE_HOT,
    ONE_ROW,
    RAW,
    REPEATS,
    SCALED,
    WEIGHTS,
    Value,
    blend,
    join,
)

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}  # fmt: skip
_DIGITS = (ast.RShift, ast.BitAnd, ast.FloorDiv)
_MOST_STEPS = 4  # more is a context of many tokens, no neighbouring turn
_LONGEST = 20_000  # characters of a constant text


class Arithmetic(Comparisons):
    """Binary operators."""

    def binop(self, op: ast.operator, left: Value, right: Value, node: ast.AST | None) -> Value:
        """left op right"""
        if isinstance(op, ast.Div) and any("#path" in obj.slots for obj in (*left.refs, *right.refs)):
            return self.path([left, right], node)  # Path(folder) / name
        constant = self._folded(op, left, right)
        if constant is not None:
            return constant
        listed = self._lists(op, left, right, node)
        if listed is not None:
            return listed
        one, two = self.flat(left), self.flat(right)
        if isinstance(op, (ast.Add, ast.Sub)) and one.flags & WEIGHTS and two.flags & GRAD and two.toks:
            return self._moved(one, two, node)
        one, two = self._followed(op, left, one, two, node), self._followed(op, right, two, one, node)
        if isinstance(op, ast.Sub) and (error := self._error(one, two)) is not None:
            return error
        if one.losses or two.losses:
            return self._of_losses(op, one, two, node)
        if (two.flags & ONE_HOT and one.active) or (one.flags & ONE_HOT and two.active):
            hot, logits = (two, one) if two.flags & ONE_HOT else (one, two)
            if hot.raw:
                return self.scored(logits, hot, node)
        result = blend(one, two)
        if isinstance(op, (ast.Add, ast.Sub)) and (one.flags ^ two.flags) & GRAD:
            result.flags |= MOVED
        if isinstance(op, _DIGITS) and one.raw and two.spans and not two.toks:  # token >> i & 1: another bit each turn
            result = self.tagged(result, two.spans)
        if one.toks or two.toks:
            if isinstance(op, ast.Mult) and any(_penalty(a, b) for a, b in ((one, two), (two, one))):
                result.flags &= ~RAW
            if not isinstance(op, (ast.BitAnd, ast.BitOr, ast.BitXor)):
                result.flags &= ~MASK
            if isinstance(op, (ast.Div, ast.MatMult)):  # shares of counts, not ids
                result.flags &= ~RAW
            if result.flags & LENGTH:
                result.flags &= ~LENGTH
            if isinstance(op, (ast.Div, ast.Mult)) and (self._scales(one, two) or self._scales(two, one)):
                logits, scale = (one, two) if self._scales(one, two) else (two, one)
                self.trace.scalers |= scale.states - logits.states
                result.flags |= SCALED
                result.flags |= HEATED if any(each.choices and not each.states for each in (one, two)) else 0
            number = two.const if one.active else one.const
            if isinstance(op, ast.Div) and isinstance(number, (int, float)) and not isinstance(number, bool):
                result.limit = float(number)
            elif isinstance(op, ast.Div) and one.active and two.spans and self.plain(two):
                result.limit = events.MOVING  # another number in each turn of a loop: a sweep
            if (one.cuts or two.cuts) and not result.flags & INDEXED:
                return self.cut(result, two.cuts if one.toks else one.cuts, node)
            return result
        return self._number(op, one, two, result, node)

    def _followed(self, op: ast.operator, value: Value, flat: Value, other: Value, node: ast.AST | None) -> Value:
        """What gradients were added to by hand, where it meets activations: a state that has learned, no loss."""
        if not flat.flags & GRAD or other.flags & GRAD or other.losses or not other.active:
            return flat
        if not flat.flags & MOVED and not isinstance(op, (ast.Add, ast.Sub)):
            return flat  # error · activation: the gradient of a weight
        cells = [obj for obj in value.refs if obj.kind == "tensor"]
        obj = cells[0] if len(cells) == 1 else self.new("tensor", None, node)
        if flat.flags & ONE_ROW:  # zeros(width) - rate * slope
            self.heap.set(obj, "#rows", "one")
        rest = flat.but(losses=0, toks=frozenset(), flags=flat.flags & ~(GRAD | MOVED))
        if flat.toks and flat.states:
            self.learn(obj, flat.toks, "gradient", node, flat.losses)
            self.heap.set(obj, "#content", rest.but(states=frozenset(), knows=0))
        return rest.but(states=rest.states | {obj.root}, knows=rest.knows | self.knows(obj))

    def _error(self, one: Value, two: Value) -> Value | None:
        """softmax - one_hot, bit - p: the gradient of a loss, written out."""
        for goal, made in ((one, two), (two, one)):
            known = goal.raw and not goal.flags & LENGTH and made.states
            if known and not made.losses and not made.flags & (WEIGHTS | GRAD):
                return Value(toks=goal.toks, states=made.states, flags=GRAD, choices=goal.choices | made.choices)
        return None

    @staticmethod
    def _scales(logits: Value, other: Value) -> bool:
        """Whether `other` is a scale of its own: chosen, or learned apart from what made the logits. Weights that were
        chosen as a whole hold their scale, too."""
        chosen = bool(other.choices & ~logits.choices) and not other.states
        chosen = chosen or bool(other.flags & NUMBER)  # of one file with the weights, and chosen: by this
        return logits.active and not other.toks and (chosen or bool(other.states - logits.states))

    def _folded(self, op: ast.operator, left: Value, right: Value) -> Value | None:
        if left.const is MISSING or right.const is MISSING or left.refs or right.refs:
            return None
        function = _BINARY.get(type(op))
        value: Any = MISSING
        if isinstance(left.const, (str, bytes)) and isinstance(op, (ast.Mod, ast.Div)):
            if isinstance(op, ast.Div):
                value = f"{left.const!s}/{right.const!s}"
        elif isinstance(op, ast.Pow) and _numbers(left.const, right.const):
            value = _power(left.const, right.const)
        elif isinstance(op, (ast.LShift, ast.RShift)) and all(isinstance(c, int) for c in (left.const, right.const)):
            value = _shift(op, left.const, right.const)
        elif function is not None and not _large(op, left.const, right.const):
            try:
                value = function(left.const, right.const)
            except Exception:
                value = MISSING
        if value is MISSING or (isinstance(value, (str, bytes)) and len(value) > _LONGEST):
            return None
        less = left.less | right.less
        if isinstance(op, ast.Sub):
            less |= {sym_of(right)}
        elif not isinstance(op, ast.Add):
            less = frozenset()
        return Value(const=value, less=less, env=left.env | right.env, choices=left.choices | right.choices)

    def _lists(self, op: ast.operator, left: Value, right: Value, node: ast.AST | None) -> Value | None:
        if left.items is not None and right.items is not None and isinstance(op, ast.Add):
            return Value(items=left.items + right.items)
        lists = [(obj, value) for value in (left, right) for obj in value.refs if obj.kind == "list"]
        if not lists or not isinstance(op, (ast.Add, ast.Mult)):
            return None
        new = self.new("list", None, node)
        held = [self.tagged(self.element_of(obj), value.spans) for obj, value in lists]
        held += [item for value in (left, right) for item in value.items or ()]
        elem = held[0]
        for each in held[1:]:
            elem = join(elem, each)
        new.slots["#elem"] = elem
        if isinstance(op, ast.Mult):  # [0.0] * n: an array
            again = left.const != 1 and right.const != 1
            # list(range(0, n, chunk)) * 3: each place comes several times
            if again and node is not None and ((elem.unit and self.plain(elem)) or self._is_piece(elem)):
                elem = self.place_of_many(elem, node)
                elem = elem.but(flags=elem.flags | REPEATS)
            new.slots["#elem"] = elem if elem.const is None else elem.but(const=MISSING)  # [None] * n: filled by and by
        return self.ref(new)

    def _is_piece(self, elem: Value) -> bool:
        """(first, last) of a part of the text, as a generator has yielded it."""
        items = elem.items or ()
        return any(each.spans for each in items) and all(map(self.plain, items))

    def _of_losses(self, op: ast.operator, one: Value, two: Value, node: ast.AST | None) -> Value:
        if isinstance(op, ast.Add):
            self.book(one)
            self.book(two)
        if one.losses and two.losses:
            less = one.less | two.less | {"loss"} if isinstance(op, ast.Sub) else one.less | two.less
            return blend(one, two).but(knows=0, less=less)
        loss, other = (one, two) if one.losses else (two, one)
        over = isinstance(op, ast.Div) and loss is one  # a sum over what was counted is a score
        ended = isinstance(op, (ast.Div, ast.Mult)) and not other.flags & GRAD and self.ended(loss.losses)
        if ended and other.states and not over:
            return self._fitted(loss, other, node)
        if other.active and self.past(loss.losses):  # weights that follow what was booked in earlier turns
            return blend(one, two)
        result = loss.but(
            const=MISSING, choices=loss.choices | other.choices, words=blend(one, two).words, env=loss.env | other.env,
            sym="", spans=(),
        )  # fmt: skip
        if loss.flags & GRAD:  # one row that moves by its gradient stays one row
            result.flags |= other.flags & ONE_ROW
        # Bounds out of a slice of a list are no parts of a window themselves; where they lie is said by names.
        cuts = frozenset(cut for cut in other.cuts if cut[2] or not other.flags & INDEXED)
        if cuts and not isinstance(op, (ast.Div, ast.Add, ast.Sub)):
            # What a mask counts picks nothing, divided by or added beside the losses of one tensor of sums.
            result = self.cut(result, cuts, node)
        apart = other.states - loss.states
        if apart and not other.flags & (WEIGHTS | GRAD) and not (over and ended):
            inner = self.nest[-1][0] if self.nest else 0
            by_position = not any(span[0] == inner for tok in loss.toks for span in tok.spans)
            result = self.rescored(result, self.earlier_dropped(other) if by_position else other, node)
        return result

    def _fitted(self, loss: Value, other: Value, node: ast.AST | None) -> Value:
        """Logits or weights times a number that was computed from the losses of a pass that is over."""
        choices = loss.choices | self.choose("fit", [loss], node)
        scaled = 0 if other.flags & WEIGHTS else SCALED
        return other.but(choices=other.choices | choices, flags=other.flags | scaled, const=MISSING, sym="")

    def _moved(self, weights: Value, grad: Value, node: ast.AST | None) -> Value:
        """w - lr·g without an optimizer: an Update whose result is new weights."""
        mask = 0
        for state in sorted(weights.states, key=lambda each: each.number):
            bit = len(self.trace.updates)
            update = self.note(
                events.Update, node, bit=bit, state=state, learned=grad.toks, how="gradient", losses=grad.losses,
                fresh=state.slots.get("#fresh", state.born),
            )  # fmt: skip
            self.trace.updates.append(update)
            mask |= 1 << bit
        return weights.but(knows=weights.knows | mask, const=MISSING)

    def _number(self, op: ast.operator, one: Value, two: Value, result: Value, node: ast.AST | None) -> Value:
        """Numbers of the program itself: loop variables, sizes, the clock."""
        left = getattr(node, "left", None) or getattr(node, "target", None)
        right = getattr(node, "right", None) or getattr(node, "value", None)
        syms = sym_of(one, left), sym_of(two, right)
        result.sym = f"{type(op).__name__.lower()}({syms[0]},{syms[1]})"[:120] if all(syms) else ""
        named = isinstance(right, ast.Attribute) or bool(two.env)
        if isinstance(op, (ast.Add, ast.Sub)) and type(two.const) is int and two.const == 0 and named:
            result.sym = syms[0]  # a setting that is off
        if isinstance(op, ast.Sub):
            result.less = one.less | ({syms[1]} if syms[1] else frozenset())
        elif isinstance(op, ast.Add):
            result.less = one.less | two.less
            if result.less and isinstance(two.const, int) and two.const > 1:
                result.less |= {f"+{two.const}"}
        result.spans, result.unit = self._affine(op, one, two, syms)
        if result.flags & CLOCK:
            result.lead = self._clock(op, one, two)
        result.limit = _limit(op, one, two)
        return result

    def _affine(self, op: ast.operator, one: Value, two: Value, syms: tuple[str, str]) -> tuple[Any, str]:
        if isinstance(op, (ast.Add, ast.Sub)):
            turn = 1 if isinstance(op, ast.Add) else -1
            for number, other, text in ((one, two, syms[1]), (two, one, syms[0])):
                if number.spans and not other.spans and number.unit:
                    steps = _steps(other, text, number.unit) if number is one or turn == 1 else 0
                    if steps:
                        return self._next(number.spans, turn * steps), number.unit
                    return number.spans, number.unit
        if isinstance(op, ast.Mult):
            for number, other, text in ((one, two, syms[1]), (two, one, syms[0])):
                if number.spans and not other.spans and number.unit == "1":
                    return number.spans, text
        if isinstance(op, ast.Sub) and one.spans and two.spans:  # a length: end - start of one chunk
            both = {loop for loop, _, _ in one.spans} & {loop for loop, _, _ in two.spans}
            rest = [span for span in (*one.spans, *two.spans) if span[0] not in both]
            return tuple(sorted([*rest, *_several(one.spans, two.spans)])), ""
        return merged_spans(one.spans, two.spans), ""

    def _next(self, spans: tuple[Span, ...], turn: int) -> tuple[Span, ...]:
        """The spans of a number that one step is added to: it is the innermost loop that counts in such steps."""
        own = {loop for loop, _, _ in spans}
        inner = next((loop for loop, _ in reversed(self.nest) if loop in own), None)
        return tuple((loop, a + turn, b + turn) if inner in (loop, None) else (loop, a, b) for loop, a, b in spans)

    @staticmethod
    def _clock(op: ast.operator, one: Value, two: Value) -> tuple[float, float]:
        a, b = one.lead if one.flags & CLOCK else (0.0, _float(one.const))
        c, d = two.lead if two.flags & CLOCK else (0.0, _float(two.const))
        if isinstance(op, ast.Add):
            return (max(a, c) or 1.0, b + d)
        if isinstance(op, ast.Sub):
            both = one.flags & two.flags & CLOCK
            return (a if both else (a - c) or 1.0, b - d)
        if isinstance(op, ast.Mult) and not (one.flags & two.flags & CLOCK):
            times = _float(two.const if one.flags & CLOCK else one.const) or 1.0
            return ((a or c) * times, (b if one.flags & CLOCK else d) * times)
        if isinstance(op, ast.Div) and one.flags & CLOCK and _float(two.const):
            return a / _float(two.const), b / _float(two.const)
        return (a or c or 1.0, 0.0)


def _steps(other: Value, text: str, unit: str) -> int:
    """How many steps a number is: 2 for `c + 2` where c counts by one, and for `start + 2 * chunk`; 0 where none."""
    if text == unit:
        return 1
    if unit == "1" and type(other.const) is int and 1 < other.const <= _MOST_STEPS:
        return other.const
    times = re.fullmatch(r"mult\((\d),(\w+)\)|mult\((\w+),(\d)\)", text)
    if times is None or (times[2] or times[3]) != unit:
        return 0
    return int(times[1] or times[4])


def _several(ends: Sequence[Span], starts: Sequence[Span]) -> list[Span]:
    """Of a length, the turns that it goes through where there are several: from the start of one chunk to the end of
    the next one."""
    begun = {loop: a for loop, a, b in starts if a == b}
    return [(loop, begun[loop], a - 1) for loop, a, b in ends if a == b and loop in begun and a - begun[loop] >= 2]


def _penalty(mask: Value, number: Value) -> bool:
    """14.0 * (ids == bos): no goal of a gradient written out, `(ids == token) - p`."""
    return bool(mask.flags & MASK) and isinstance(number.const, (int, float)) and abs(number.const) not in (0, 1)


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _power(base: Any, exponent: Any) -> Any:
    try:
        small = abs(exponent) <= 64 and abs(base) <= 1e6
        return base**exponent if small else MISSING
    except Exception:
        return MISSING


def _shift(op: ast.operator, one: int, two: int) -> Any:
    if not 0 <= two <= 64 or abs(one) > 1 << 64:
        return MISSING
    return one << two if isinstance(op, ast.LShift) else one >> two


def _large(op: ast.operator, one: Any, two: Any) -> bool:
    if isinstance(op, ast.Mult):
        sizes = [len(value) for value in (one, two) if isinstance(value, (str, bytes, tuple, list))]
        counts = [value for value in (one, two) if isinstance(value, int)]
        if sizes and counts and sizes[0] * max(counts[0], 0) > _LONGEST:
            return True
        return all(isinstance(v, int) and abs(v) > 1 << 256 for v in (one, two))
    return False


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else 0.0


def _limit(op: ast.operator, one: Value, two: Value) -> float | None:
    """How an upper bound moves through a product or a sum."""
    for number, other in ((one, two), (two, one)):
        if number.limit is None:
            continue
        if isinstance(op, ast.Mult) and isinstance(other.const, (int, float)):
            return number.limit * other.const
        if isinstance(op, (ast.Add, ast.Sub)) and number is one:
            return number.limit
    return None
