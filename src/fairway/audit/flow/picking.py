"""Losses, and what is picked or chosen among values: the least, the first, one of two, what a sort puts in order."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from fairway.audit.flow.arithmetic import Arithmetic
from fairway.audit.flow.indices import sym_of
from fairway.audit.flow.known import LOSSES, PAIRS
from fairway.audit.flow.ordering import by_length, in_order
from fairway.audit.flow.sorting import in_text_order, sorted_places
from fairway.audit.flow.tokens import Span
from fairway.audit.flow.values import (
    CLIPPED,
    HEATED,
    LENGTH,
    MASK,
    MISSING,
    NO_OBJECTS,
    NOTHING,
    POSITIONS,
    RAW,
    SCALED,
    Value,
    blend,
)


class Picking(Arithmetic):
    """Losses and choices among values."""

    def _loss(self, name: str, flats: list[Value], node: ast.AST | None) -> Value | None:
        targets = next((each for each in flats if each.raw), None)
        rows = [each for each in flats if each.active and (not each.losses & ~self.logs or self.past(each.losses))]
        logits = self.following(rows[0]) if rows else None
        if targets is not None and logits is not None:
            return self.scored(logits, targets, node)
        if LOSSES.search(name) and "entropy" in name.lower() and logits is not None and len(flats) > 1:
            return self.scored(
                logits, next((each for each in flats if each is not logits and each.toks), NOTHING), node
            )
        return None

    def _least(
        self, name: str, args: list[Value], flats: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        bound = _first_place(name, flats)
        if bound is not None:
            return bound
        consts = [each.const for each in args]
        numbers = len(args) > 1 and all(isinstance(c, (int, float)) for c in consts) and not kwargs
        if name in ("min", "max") and numbers:
            return Value(const=(min if name == "min" else max)(consts), less=_less(args), env=blend(*args).env)
        if "key" in kwargs and len(args) == 1 and args[0].items and name in ("min", "max"):
            listed = self.new("list", None, node)
            listed.slots["#items"] = args[0].but(refs=frozenset())
            args = [self.ref(listed)]
        if name in ("min", "max", "sorted", "nsmallest", "nlargest"):  # of a dict, the keys are compared
            flats = [self.flat(self.elements(arg, node).any) if _is_dict(arg) else each
                     for each, arg in zip(flats, [*args, *kwargs.values()], strict=True)]  # fmt: skip
        if name in ("min", "max", "sorted"):  # named tuples are compared by their fields
            flats = [each if (row := self.row_of(arg)) is None else blend(*map(self.flat, row))
                     for each, arg in zip(flats, [*args, *kwargs.values()], strict=True)]  # fmt: skip
        result = blend(*flats) if flats else NOTHING
        losing = [each for each in flats if each.losses]
        stabiliser = len(args) == 1 and name.startswith(("max", "amax", "fmax", "nanmax")) and not args[0].refs
        made = bool(losing) and not stabiliser and (len(losing) > 1 or len(args) == 1 or name not in PAIRS)
        if made:
            result.choices |= self.choose(name, flats[: len(args)], node)
            if "arg" in name:  # which one it is, not the loss
                return Value(choices=result.choices, env=result.env)
        refs = [obj for each in args for obj in each.refs if obj.kind in ("list", "generator", "dict", "range")]
        if refs and name in ("min", "max", "sorted", "nsmallest", "nlargest"):
            in_list = refs[0].kind in ("list", "generator")
            elem = self.element_of(refs[0]) if in_list else self.elements(self.ref(refs[0]), node).any
            elem = self.tagged(elem, next(each.spans for each in args if refs[0] in each.refs))
            key = kwargs.get("key")
            if refs[0].kind == "dict" and key is None and self.flat(elem).losses and not made:
                result.choices |= self.choose(name, [elem], node)
            if key is not None and not made:
                keyed = self.flat(self.call(key, [elem], {}, node))
                if keyed.losses:
                    result.choices |= self.choose(name, [keyed], node)
            picked = self._chosen_from(elem, result.choices)
            if key is not None and name == "sorted" and self.sorts_by_length(key, elem, node):
                picked = in_order(picked)
            if name in ("sorted", "nsmallest", "nlargest"):
                new = self.new("list", None, node)
                new.slots["#elem"] = picked
                return self.ref(new)
            return picked
        if "sort" in name and flats and by_length(flats[0]):
            self.trace.orders.append((len(self.trace.events), self.place(node)))
            return in_order(result)
        if in_text_order(name, flats, kwargs):
            return sorted_places(name, flats, kwargs)
        result.less = _less(args)
        result.limit = next((float(c) for c in consts if isinstance(c, (int, float)) and name == "min"), None)
        limits = [each.limit for each in args if each.limit is not None]
        if result.limit is None and name == "min" and limits:
            result.limit = min(limits)
        moving = [each for each in args if each.spans]
        if name == "min" and moving and any(not each.spans and each.const is MISSING for each in args):
            result.flags |= CLIPPED
        varying = [each for each in args if each.const is MISSING]
        if not moving and len(varying) == 1 and len(args) == 2:  # max(end - start - stride, 0)
            result.sym = varying[0].sym
        if len(moving) == 1:
            result.spans, result.unit, result.sym = moving[0].spans, moving[0].unit, moving[0].sym
            length = next((each for each in args if not each.spans and each.const is not MISSING), None)
            if name == "min" and length is not None and moving[0].sym.startswith("sub(") and moving[0].less:
                result.sym, result.flags = sym_of(length), result.flags | CLIPPED  # min(length, total - start)
        elif len(moving) == 2 and name in ("min", "max"):  # min(at + step, end of the chunk)
            result.spans = _clamped(min if name == "min" else max, moving[0].spans, moving[1].spans)
        if result.toks and not result.flags & LENGTH and result.flags & RAW and name == "max":
            result = result.but(toks=frozenset(), flags=0)
        return result

    def sorts_by_length(self, key: Value, elem: Value, node: ast.AST | None) -> bool:
        """Whether the key of a sort is the length of what is sorted; where it stands is kept."""
        keyed = self.call(key, [elem], {}, node)
        found = by_length(keyed if keyed.items else self.flat(keyed), self.flat(elem))
        if found:
            self.trace.orders.append((len(self.trace.events), self.place(node)))
        return found

    def _where(self, flats: list[Value], node: ast.AST | None) -> Value:
        condition, one, two = flats[:3]
        result = blend(one, two)
        result.choices |= condition.choices
        if condition.toks and not result.toks:
            result = blend(result, condition)
            result.flags &= ~MASK  # a number for each token, by whether the condition holds
        if condition.cuts and (one.toks or two.toks):
            result = self.cut(result, condition.cuts, node)
        elif condition.cuts and one.flags & POSITIONS and not one.cuts:  # where(mask, places, n)
            result.cuts = condition.cuts
        if condition.choices and result.losses:  # which losses hang on the choice is asked of these alone
            return self.rescored(result, condition, node)
        return result

    def _logarithm(self, value: Value, node: ast.AST | None) -> Value:
        """A logarithm of what tables say is a loss: not log1p, which is of counts, or of what a hint costs."""
        tables = [state for state in value.states if "#module" not in state.slots and state.slots.get("#learned")]
        if value.active and not value.losses and tables:
            toks = value.toks.union(*self.asked)
            loss = self.scored(value, Value(toks=self.newest(toks), flags=RAW), node)
            self.logs |= loss.losses
            return loss.but(flags=loss.flags | (SCALED if value.flags & HEATED else 0))
        return value.but(const=MISSING, refs=NO_OBJECTS)

    def rows_again(self, value: Value) -> Value:
        """What a logarithm made, as probabilities or as logits: no loss is booked, and tables know what they know."""
        made = list(self.trace.scored(self.trace.family(value.losses)))
        states = value.states.union(*(each.states for each in made))
        knows = value.knows
        for each in made:
            knows |= each.knows
        return value.but(losses=0, states=states, knows=knows, const=MISSING)

    def _functional(self, args: list[Value], node: ast.AST | None) -> Value:
        """torch.func.functional_call(model, weights, arguments)"""
        weights = self.flat(args[1]) if len(args) > 1 else NOTHING
        given = list(args[2].items) if len(args) > 2 and args[2].items is not None else args[2:3]
        extra = Value(states=weights.states, knows=weights.knows, choices=weights.choices)
        before = len(self.trace.scores)
        result = self.call(args[0], given, {}, node) if args else NOTHING
        if result.losses and len(self.trace.scores) > before:
            loss = self.flat(result)
            bit = self.rescored(loss, extra, node)
            return bit
        flat = self.flat(result)
        return blend(flat, extra) if flat.toks else flat


def _clamped(least: Callable[..., int], one: Sequence[Span], other: Sequence[Span]) -> tuple[Span, ...]:
    """The iterations of the least (or greatest) of two places: of a loop that both depend on, the least of the two."""
    table = {loop: (low, high) for loop, low, high in one}
    for loop, low, high in other:
        both = (low, high) if loop not in table else (least(low, table[loop][0]), least(high, table[loop][1]))
        table[loop] = both
    return tuple(sorted((loop, low, high) for loop, (low, high) in table.items()))


def _first_place(name: str, flats: list[Value]) -> Value | None:
    """`where(mask, places, n).amin(1)`, `mask.long().argmax(1)`: the place at which a mask begins."""
    mask = flats[0] if flats else NOTHING
    begins = [(end, less) for side, end, less in mask.cuts if side == "tail"]
    least = name in ("amin", "min") and mask.flags & POSITIONS
    first = name == "argmax" and not mask.flags & POSITIONS
    if not (least or first) or len(begins) != 1 or mask.toks or mask.losses:
        return None
    return Value(sym=begins[0][0], less=begins[0][1])


def _is_dict(value: Value) -> bool:
    return bool(value.refs) and all(obj.kind == "dict" for obj in value.refs)


def _less(args: list[Value]) -> frozenset[str]:
    found: frozenset[str] = frozenset()
    for each in args:
        found |= each.less
    return found
