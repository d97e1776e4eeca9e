"""Lists, dicts and tensors: what is written into them, and what a table learns by it."""

from __future__ import annotations

import ast

from fairway.audit.flow.containers import Containers, cell_of
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import Part, one_key
from fairway.audit.flow.sorting import aligned, looks_ahead
from fairway.audit.flow.tokens import Cut, Span
from fairway.audit.flow.values import (
    DIGEST,
    GRAD,
    LENGTH,
    MASK,
    MISSING,
    NOTHING,
    Value,
    blend,
    hashable,
    join,
)


class Writing(Containers):
    """Writing by index."""

    def put_item(self, base: Value, parts: list[Part], value: Value, node: ast.AST | None) -> None:
        """base[parts] = value"""
        parts = one_key(base, parts)
        if self.chosen:
            value = value.but(choices=value.choices | self.chosen)
        keys = [part.value for part in parts if part.value is not None]
        for obj in sorted(base.refs, key=lambda each: each.number)[:6]:
            if obj.kind == "tensor":
                self._put_tensor(obj, parts, value, node)
            elif obj.kind in ("list", "dict"):
                self._put_container(obj, keys, base, value, node)
            elif obj.kind in ("instance", "thing"):
                method = self.find(obj.data, "__setitem__") if obj.kind == "instance" else None
                if method is not None:
                    self.call(method[0], [self.ref(obj), keys[0] if keys else NOTHING, value], {}, node)
                elif "#held" in obj.slots:
                    self.put_item(obj.slots["#held"], parts, value, node)
                elif "#module" in obj.slots:
                    self.write(obj, self._put_where(keys, value), node, part=True)
                else:
                    self.add_content(obj, value)

    def _put_where(self, keys: list[Value], value: Value) -> Value:
        """What is written into weights, and the activations that say where: weight[:, ~used] = 0."""
        seen = [flat for flat in map(self.flat, keys) if flat.toks and flat.states]
        return blend(self.flat(value), *seen) if seen else value

    def token_keys(self, keys: list[Value], node: ast.AST | None) -> list[Value]:
        """Keys that are made of token ids: what is entered under them is a table of the tokens. Those that came out of
        tables are none, which is written down: the first time that the place is reached these are empty."""
        flats = [self.flat(key) for key in keys]
        if any(key.toks and key.states for key in flats):
            self.trace.recalled.add(self._stand(node)["stack"])
        return [key for key in flats if key.toks and not key.states and not key.losses and not key.flags & LENGTH]

    def entered(self, obj: Obj, keys: list[Value], value: Value, node: ast.AST | None) -> None:
        """A table learns the tokens of its keys, and of what is entered if that is tokens."""
        toks = frozenset(tok for key in keys for tok in key.toks)
        held = self.flat(value)
        if held.raw or (held.active and not held.losses):
            toks |= held.toks
        self.learn(obj, toks, "table", node)

    def _put_tensor(self, obj: Obj, parts: list[Part], value: Value, node: ast.AST | None) -> None:
        keys = self.token_keys([part.value for part in parts if part.value is not None], node)
        flat = self.flat(value)
        if looks_ahead(flat, parts):
            self.learn(obj, flat.toks, "table", node)
            return
        flat = aligned(flat, parts)
        if keys and "#leaf" not in obj.slots and obj.owner is None:
            if all(key.flags & MASK for key in keys):  # places, not entries of a table
                self.write(obj, self.earlier_dropped(blend(flat, *keys)), node, part=True)
            else:
                self.entered(obj, keys, value, node)
            return
        if flat.flags & GRAD and flat.toks and "#leaf" not in obj.slots and not any(part.slice for part in parts):
            self.learn(obj, flat.toks, "table", node, flat.losses)  # one entry moves by its own error
            return
        if any(part.slice and _is_empty(part) for part in parts):
            return
        cuts = self.cuts_of(parts)
        old = self.content(obj)
        if cuts and isinstance(flat.const, (int, float, bool)):
            sides = cuts if flat.const is True or flat.const > 0 else frozenset(_other(cut) for cut in cuts)
            if old.toks and not flat.const > 0:  # targets blanked out
                self.heap.set(obj, "#content", self.cut(old, sides, node))
            else:
                every = len(parts) > 1 and parts[0].slice and parts[0].low is None and parts[0].high is None
                wider = every and bool(old.cuts) and flat.const is True  # of all rows, beside what was true before
                both = old.cuts & sides if wider else old.cuts | sides
                self.heap.set(obj, "#content", old.but(cuts=both, const=MISSING))
            return
        spans: tuple[Span, ...] = ()
        for part in parts:
            spans = self._with(spans, self.slice_spans(part) if part.slice else part.value.spans if part.value else ())
        if old.toks and not flat.losses:
            self.heap.set(obj, "#content", self.written_toks(old, spans))
        whole = all(part.slice and part.low is None and part.high is None for part in parts)
        if obj.owner is not None or "#leaf" in obj.slots:
            flat = self._put_where([part.value for part in parts if part.value is not None], flat)
        self.write(obj, self.earlier_dropped(flat), node, strong=whole, part=not whole)

    def _put_container(self, obj: Obj, keys: list[Value], base: Value, value: Value, node: ast.AST | None) -> None:
        tokens = self.token_keys(keys, node)
        if tokens and not self._kept(tokens, self.flat(value)):
            self.entered(obj, tokens, value, node)
        value = self.earlier_dropped(value)
        key = keys[0] if keys else NOTHING
        exact = obj.slots.get("#items")
        if isinstance(exact, Value) and exact.items is not None:
            if isinstance(key.const, int) and 0 <= key.const < len(exact.items) and len(base.refs) == 1:
                items = (*exact.items[: key.const], value, *exact.items[key.const + 1 :])
                self.heap.set(obj, "#items", Value(items=items))
                return
            self.loosen(obj)
        if key.const is not MISSING and hashable(key.const):
            old = obj.slots.get(("k", key.const))
            both = join(old, value) if isinstance(old, Value) and len(base.refs) > 1 else value
            self.heap.set(obj, ("k", key.const), both)
            self.reflected(obj, key.const, both)
        else:
            if not self._leaf_under_every_key(obj, value):
                self.add_content(obj, value, "#elem")
                if cell_of(key):
                    self.add_content(obj, value, cell_of(key))
            self.add_content(obj, key, "#keys")

    def _leaf_under_every_key(self, obj: Obj, value: Value) -> bool:
        """`for k in list(P): P[k] = P[k].to(device).requires_grad_()`: one leaf stands for all, in the place of the
        tensors that it was made of. False for a dict without known keys, and for leaves that different lines make:
        they are told apart."""
        made = {each.place for each in value.refs if "#leaf" in each.slots}
        if not made:
            return False
        known = [(key, held) for key, held in obj.slots.items() if isinstance(key, tuple) and isinstance(held, Value)]
        leaves = [each for _, held in known for each in held.refs if "#leaf" in each.slots]
        if leaves:
            return any(each.place in made for each in leaves)
        for key, held in known:
            flat = self.flat(held)
            if not (flat.toks or flat.losses or flat.const is not MISSING):
                self.heap.set(obj, key, value)
        if known:
            self.heap.set(obj, "#elem", value)
        return bool(known)

    @staticmethod
    def _kept(keys: list[Value], value: Value) -> bool:
        """Whether an answer is kept under all that it was computed from, to spare computing it again."""
        if not value.active or value.losses or not all(key.flags & DIGEST for key in keys):
            return False
        whole = [(tok.data, set(tok.spans)) for key in keys for tok in key.toks if not tok.cuts]
        return all(any(tok.data == data and spans <= set(tok.spans) for data, spans in whole) for tok in value.toks)

    def loosen(self, obj: Obj) -> None:
        """Forget which element stands where."""
        exact = obj.slots.get("#items")
        if isinstance(exact, Value):
            self.heap.drop(obj, "#items")
            for item in exact.items or ():
                self.add_content(obj, item, "#elem")

    def place_of_many(self, elem: Value, node: ast.AST) -> Value:
        """An element of a range that lies in a list: a place that was made once, whoever goes through the list."""
        return elem.but(spans=((self.loop_id(node), 1, 2),)) if elem.unit and not elem.spans else elem

    def loop_id(self, node: ast.AST) -> int:
        raise NotImplementedError

    def add(self, obj: Obj, value: Value, node: ast.AST | None, at: int | None = None) -> None:
        """list.append, or list.insert at a place that is known"""
        self.book(value)
        if self.chosen:
            value = value.but(choices=value.choices | self.chosen)
        value = self.repeats(self.earlier_dropped(value), obj.born)
        exact = obj.slots.get("#items")
        if isinstance(exact, Value) and exact.items is not None:
            here, there = ([loop for loop, _ in nest] for nest in (self.nest, obj.born))
            if here == there and len(exact.items) < 24:
                end = len(exact.items) if at is None else at
                self.heap.set(obj, "#items", Value(items=(*exact.items[:end], value, *exact.items[end:])))
                return
            self.loosen(obj)
        self.add_content(obj, value, "#elem")


def _other(cut: Cut) -> Cut:
    side, end, less = cut
    return ("head" if side == "tail" else "tail", end, less)


def _is_empty(part: Part) -> bool:
    """edge : edge + 0"""
    if part.low is None or part.high is None:
        return False
    low = part.low.sym or part.low_text
    return bool(low) and part.low.const is MISSING and low == (part.high.sym or part.high_text)
