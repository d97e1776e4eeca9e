"""What a loop goes through."""

from __future__ import annotations

import ast
from dataclasses import replace

from fairway.audit.flow.core import Frame
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import Elements, Part, sym_of
from fairway.audit.flow.shares import WINDOW, share_of
from fairway.audit.flow.tokens import Cut
from fairway.audit.flow.values import (
    GRAD,
    INDEXED,
    LENGTH,
    MISSING,
    NO_OBJECTS,
    NOTHING,
    WEIGHTS,
    Value,
    join,
)
from fairway.audit.flow.writing import Writing
from fairway.audit.settings import is_setting

UNROLLED = 6  # elements of a literal list that a loop takes one by one
ARGUMENTS = 24  # of a call, and tensors of a batch that are moved to a device
STAGES = 24  # the same, where they are functions or modules: what they do, and in which order, is the script itself
SECTION = 64  # settings of one section, in a loop over sections
SETTINGS = 200  # the same, where they are names with their defaults: each may switch something off


class Iteration(Writing):
    """elements(value)"""

    unrolled = UNROLLED  # elements of a tuple that are gone through one by one
    handed = UNROLLED  # and of a list; more of them are arguments of a call

    def elements(self, value: Value, node: ast.AST | None) -> Elements:
        """What `for x in value` goes through."""
        found = self._elements(value, node)
        if not value.choices:
            return found
        exact = (
            tuple(self._chosen_from(each, value.choices) for each in found.exact) if found.exact is not None else None
        )
        return replace(found, exact=exact, any=self._chosen_from(found.any, value.choices))

    def spread(self, value: Value, node: ast.AST | None) -> Elements:
        """What `f(*value)` hands on: each of two dozen has its own place."""
        before = self.unrolled, self.handed
        self.unrolled = self.handed = ARGUMENTS
        try:
            return self.elements(value, node)
        finally:
            self.unrolled, self.handed = before

    def _elements(self, value: Value, node: ast.AST | None) -> Elements:
        if value.items is not None and not value.refs:
            return self._exactly(value.items, value, self.unrolled)
        if isinstance(value.const, (str, bytes, tuple, list, dict, set, frozenset)) and not value.refs:
            held = list(value.const)
            return self._exactly(tuple(Value(const=each) for each in held[:SETTINGS]), value)
        row = self.row_of(value) if value.refs else None
        if row is not None and not any(self.find(obj.data, "__iter__") for obj in value.refs):
            return self._exactly(row, value)
        found: list[Elements] = []
        for obj in sorted(value.refs, key=lambda each: each.number)[:6]:
            found.append(self._elements_of(obj, value, node))
        own = value.but(const=MISSING, refs=NO_OBJECTS, items=None, limit=None)
        if not found:
            return Elements(None, own)
        if own.toks and (own.flags & GRAD or all(obj.kind == "tensor" for obj in value.refs)):
            found.append(
                Elements(None, own)
            )  # (rounded, scale) or (weight.half(),), gradients or zeros: poured into one
        if len(found) == 1:
            return found[0]
        any_of = found[0].any
        for each in found[1:]:
            any_of = join(any_of, each.any)
        return Elements(None, any_of)

    def _exactly(self, items: tuple[Value, ...], value: Value, few: int = UNROLLED) -> Elements:
        any_of = NOTHING if not items else items[0]
        for each in items[1:]:
            any_of = join(any_of, each)
        any_of = self.tagged(any_of, value.spans)
        most = SETTINGS if all(map(self._setting, items)) else STAGES if _staged(items) else few
        short = len(items) <= most
        exact = tuple(self.tagged(item, value.spans) for item in items) if short else None
        return Elements(exact, any_of, len(items))

    @staticmethod
    def _setting(item: Value) -> bool:
        """Whether it is a name and its default, ("rank", 16) or "rank=16", a section of such, or a field of a
        dataclass."""
        if any(obj.kind == "thing" and obj.data == "field" for obj in item.refs):
            return True
        if isinstance(item.const, str):
            return is_setting(item.const)
        if item.items is not None and len(item.items) > 2:  # ("rank", 16, "of the adapters"), ("rank", int, 16)
            return is_option(item)
        name, value = item.items if item.items is not None and len(item.items) == 2 else (NOTHING, NOTHING)
        if not isinstance(name.const, str):
            return False
        section = bool(value.refs) and all(plain_section(obj) or _plain_list(obj) for obj in value.refs)
        return section or value.const is not MISSING or not (value.refs or value.toks or value.losses)

    def _elements_of(self, obj: Obj, value: Value, node: ast.AST | None) -> Elements:
        if obj.kind == "range":
            return self._range(obj)
        if obj.kind == "dict":
            keys = [Value(const=key[1]) for key in obj.slots if isinstance(key, tuple)]
            more = obj.slots.get("#keys")
            if isinstance(more, Value) or "#elem" in obj.slots or not keys:
                any_key = more if isinstance(more, Value) else NOTHING
                for key in keys:
                    any_key = join(any_key, key)
                return Elements(None, any_key)
            return self._exactly(tuple(keys), value)
        if isinstance(obj.data, Frame) and "#elem" not in obj.slots:
            return Elements(None, self.tagged(self.drained(obj), value.spans))
        if obj.kind in ("list", "generator"):
            exact = obj.slots.get("#items")
            if isinstance(exact, Value) and exact.items is not None and "#elem" not in obj.slots:
                return self._exactly(exact.items, value, self.handed)
            return Elements(None, self.tagged(self.element_of(obj), value.spans))
        if obj.kind == "instance":
            for name in ("__iter__", "__next__", "__getitem__"):
                method = self.find(obj.data, name)
                if method is not None:
                    args = [self.ref(obj)] + ([NOTHING] if name == "__getitem__" else [])
                    made = self.call(method[0], args, {}, node)
                    if name == "__iter__" and obj not in made.refs:
                        return self.elements(made, node)
                    if name == "__iter__":
                        step = self.find(obj.data, "__next__")
                        made = self.call(step[0], [self.ref(obj)], {}, node) if step else made
                    return Elements(None, made)
            if "#held" in obj.slots:
                return self.elements(obj.slots["#held"], node)
        if obj.kind == "tensor":
            return Elements(None, self.flat(self.ref(obj)).but(const=MISSING))
        if "#module" in obj.slots:
            held = self.content_elem(obj)
            of_weights = held is NOTHING and value.flags & WEIGHTS  # (rounded, scale) or (weight.half(),)
            return Elements(None, self.flat(value).but(const=MISSING) if of_weights else held)
        content = obj.slots.get("#content", NOTHING)
        return Elements(None, self.tagged(content, value.spans))

    def again(self, count: Value, size: Value, rest: Value, node: ast.AST | None) -> Value:
        """count % size, where the count goes through range(rounds * size): the same places come in every round."""
        if size.const is not MISSING or not self.plain(rest):
            return rest
        names = {sym_of(size), ast.unparse(node) if node is not None else ""} - {"", "size"}
        over = {loop for loop, _, _ in count.spans if any(_product(self.ends.get(loop, ()), name) for name in names)}
        return rest.but(spans=tuple(span for span in rest.spans if span[0] not in over)) if over else rest

    def _range(self, obj: Obj) -> Elements:
        start, stop, step = obj.data
        limit = stop.limit
        if limit is None and isinstance(stop.const, (int, float)) and not stop.flags & LENGTH:
            limit = float(stop.const)
        env = start.env | stop.env | step.env
        inside = bool(start.less and start.sym) and not (
            start.spans or start.flags & LENGTH
        )  # range(length - stride, n)
        cuts: frozenset[Cut] = frozenset((("tail", start.sym, start.less),)) if inside else frozenset()
        share = share_of(start, stop)
        within = bool(start.flags & INDEXED)  # a place in a document that a slice of their list let through
        spans = start.spans
        if (
            type(start.const) is int and stop.unit and stop.spans
        ):  # range(0, end of this chunk): all that lies before it
            spans = self.slice_spans(Part(None, None, stop, slice=True))
        elif start.spans and stop.spans:  # range(start, end of the chunk after this one, step)
            spans = self.reaching(start.spans, {loop: (a, b) for loop, a, b in stop.spans})
        elif any(high > low for _, low, high in stop.spans):  # of the length of several chunks
            spans = stop.spans
        flags = INDEXED if share or within else 0
        if flags and limit is not None and limit <= WINDOW:  # the length of a window, whichever the list let through
            limit = None
        cuts |= share | (start.cuts if within else frozenset())
        any_of = Value(
            unit=sym_of(step), limit=limit, env=env, spans=spans, choices=stop.choices, cuts=cuts, flags=flags
        )
        consts = (start.const, stop.const, step.const)
        if all(isinstance(each, int) for each in consts) and step.const:
            turns = range(*consts)
            if not turns:
                return Elements(None, any_of, 0)
            return Elements(None, any_of, len(turns), len(turns) <= 32, turns[0], turns[-1])
        return Elements(None, any_of)


def _product(ends: tuple[str, ...], factor: str) -> bool:
    """Whether an end is a product of which this is a factor: "n * rounds", or "mult(n,2)", cut after 120 letters."""
    return any(
        (end.startswith("mult(") and (factor in end or end[5:].startswith(factor[:90])))
        or end.startswith(f"{factor} * ")
        or end.endswith(f" * {factor}")
        for end in ends
    )


def _staged(items: tuple[Value, ...]) -> bool:
    """Whether these are things to do, or names of such: `for name in PLAN: STAGES[name](run)`."""
    named = (isinstance(item.const, str) and item.const.isidentifier() for item in items)
    return any(map(_runs, items)) or all(named)


def is_option(element: Value) -> bool:
    """("CHUNK", 48), ("chunk", int, 48): a number under a name is no place in the data, whichever turn reads it."""
    if not element.items or not isinstance(element.items[0].const, str):
        return False
    return all(
        item.const is not MISSING or (item.refs and all(obj.kind in ("foreign", "function") for obj in item.refs))
        for item in element.items[1:]
    )


def _runs(value: Value) -> bool:
    """Whether an element is a function or a module, or a pair with one: a stage that is called in its turn."""
    held = (value, *(value.items or ()))
    return any(
        obj.kind in ("function", "bound", "partial") or "#module" in obj.slots for each in held for obj in each.refs
    )


def plain_section(obj: Obj, depth: int = 3) -> bool:
    """{"steps": 20, "rate": 0.1, "orders": [1, 2]}, or a dataclass of such fields, and sections of such sections"""
    named: type = {"dict": tuple, "instance": str}.get(obj.kind, int)
    said = (value for key, value in obj.slots.items() if isinstance(key, named) and not str(key).startswith("#"))
    held = [each for each in said if isinstance(each, Value)]
    refs = (ref for each in held for ref in each.refs)
    return bool(held) and all(_plain_list(ref) or (depth > 0 and plain_section(ref, depth - 1)) for ref in refs)


def _plain_list(obj: Obj) -> bool:
    """[64.0, 24.0], [[6, 6], [6, 5]]"""
    items = obj.slots.get("#items")
    if obj.kind != "list" or not isinstance(items, Value):
        return False
    return all(_plain_list(ref) for each in items.items or () for ref in each.refs)
