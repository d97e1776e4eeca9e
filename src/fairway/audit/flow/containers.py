"""Lists, dicts and tensors: what lies in them, by index, slice and iteration."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import replace

from fairway.audit.flow.events import bits
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indexing import Indexing
from fairway.audit.flow.indices import Part, one_key, overlaps, sparse, step_of, sym_of
from fairway.audit.flow.ordering import in_order
from fairway.audit.flow.shares import WINDOW, before_share, first_of, indexed, limited, of_rank
from fairway.audit.flow.sorting import order_of
from fairway.audit.flow.tokens import Span, Tok, narrowed, part_of
from fairway.audit.flow.values import (
    CLIPPED,
    GRAD,
    INDEXED,
    LENGTH,
    MASK,
    MISSING,
    NOTHING,
    ONE_ROW,
    ORDERED,
    RANKED,
    RAW,
    WEIGHTS,
    Value,
    blend,
    hashable,
    join,
    same,
)

_FILES = 8  # of the validation split, at most: a part of it that is told by so small a number


class Containers(Indexing):
    """Reading and writing by index."""

    def item(self, base: Value, parts: list[Part], node: ast.AST | None) -> Value:
        """base[parts]"""
        parts = one_key(base, parts)
        if base.states and base.refs and all(obj.kind in ("list", "dict") for obj in base.refs):
            return self._out_of_entry(base, parts, node)
        if len(parts) == 1 and not parts[0].slice:
            exact = self._exact(base, parts[0].value or NOTHING)
            if exact is not None:
                return exact
        if base.items is not None and len(parts) == 1 and parts[0].slice:
            cut = self._sliced_items(base, parts[0])
            if cut is not None:
                return cut
        found = [self._held_at(obj, base, parts, node) for obj in sorted(base.refs, key=lambda each: each.number)[:6]]
        if base.items is not None:
            found += list(base.items)
        if base.toks or base.losses or base.states or not found:
            found.append(self.cut_tensor(base.but(refs=frozenset(), items=None, const=MISSING), parts, node))
        result = found[0]
        for each in found[1:]:
            result = join(result, each)
        if any(part.value is not None and ORDERED & part.value.env for part in parts):
            result = in_order(result)
        picking = 0
        for part in parts:
            picking |= part.value.choices if part.value else 0
            if part.slice and base.refs and all(obj.kind == "list" for obj in base.refs):  # kept[-count:]
                picking |= blend(*(end for end in (part.low, part.high) if end is not None)).choices
        if picking and (held := self.flat(base)).states and not held.losses:
            self.trace.weighed |= picking & ~held.choices
        if picking and (held := self.flat(base)).losses:
            family = self.trace.family(held.losses)
            compared = (each for each in self.trace.chosen(picking) if self.trace.family(each.losses) & family)
            self.trace.own |= sum({1 << each.bit for each in compared})
        choices = base.choices | picking
        if choices:
            result = result.but(choices=result.choices | choices)
            self._left_out(base, parts, node)
        if picking and base.refs and not base.losses and result.losses:  # a list of losses: one of them counts
            return self.rescored(result, Value(choices=picking), node)
        return result

    def _out_of_entry(self, base: Value, parts: list[Part], node: ast.AST | None) -> Value:
        """`table[context][0]`: what lies in a list or dict that was looked up in a table. What that has learned is
        known; whose tokens they are, `knows` says."""
        told = base.but(refs=frozenset(), items=None, const=MISSING)
        inner = self.item(base.but(states=frozenset(), knows=0, toks=frozenset(), flags=0), parts, node)
        held = self.flat(inner)
        return blend(held if held.losses else held.but(toks=frozenset(), const=MISSING), told).but(refs=inner.refs)

    def _left_out(self, base: Value, parts: list[Part], node: ast.AST | None) -> None:
        """nll[nll <= limit]: losses are left out for being as large as they are. Not weights[depth]: numbers by which
        something is looked up, of a table that learned from losses."""
        held = self.flat(base).losses
        for part in parts:
            if part.value is None or part.value.flags & LENGTH:
                continue
            chosen = [choice for choice in self.trace.chosen(part.value.choices) if choice.form == "if"]
            if chosen and (part.value.flags & MASK or any(choice.losses & held for choice in chosen)):
                for bit in bits(held):
                    self.trace.picked[bit] = self.place(node)
                    self.trace.masked[bit] = part.value.choices

    def _exact(self, base: Value, index: Value) -> Value | None:
        if (
            base.items is not None
            and isinstance(index.const, int)
            and -len(base.items) <= index.const < len(base.items)
        ):
            found = base.items[index.const]
            return self._chosen_from(found, base.choices) if base.choices else found
        if isinstance(base.const, (str, bytes, tuple, list, dict)) and index.const is not MISSING:
            try:
                return Value(const=base.const[index.const])
            except (LookupError, TypeError):
                return NOTHING
        return None

    def _sliced_items(self, base: Value, part: Part) -> Value | None:
        low = part.low.const if part.low else None
        high = part.high.const if part.high else None
        if all(each is None or isinstance(each, int) for each in (low, high)):
            return base.but(items=(base.items or ())[low:high], const=MISSING)
        return None

    def _held_at(self, obj: Obj, base: Value, parts: list[Part], node: ast.AST | None) -> Value:
        keys = [part.value for part in parts if part.value is not None]
        spans: tuple[Span, ...] = base.spans
        for part in parts:
            spans = self._with(spans, self.slice_spans(part) if part.slice else part.value.spans if part.value else ())
        if obj.kind == "tensor":
            if "#leaf" in obj.slots or obj.owner is not None or obj.slots.get("#learned"):
                keyed = [key for key in map(self.flat, keys) if key.toks]
                held = blend(self.flat(self.ref(obj)), *keyed) if keyed else self.ref(obj)
                return held
            column = self._column(obj, parts)
            if column is not None:
                return column
            content = self.flat(self.ref(obj))
            return self.cut_tensor(content.but(const=MISSING), parts, node)
        if obj.kind in ("list", "generator") and parts and parts[0].slice:
            return self._sliced_list(obj, parts, spans, node)
        if obj.kind in ("list", "dict", "generator"):
            return self._looked_up(obj, keys, spans, node)
        if obj.kind == "range":
            return Value(spans=spans, unit=sym_of(obj.data[2]) or "1")
        if obj.kind in ("instance", "thing") and "#module" in obj.slots:
            layers = obj.slots.get("#content")
            if isinstance(layers, Value) and (layers.refs or layers.items) and obj.kind == "thing":
                if (
                    parts and parts[0].slice
                ):  # model.blocks[-2:]: still a list of its layers, and what it learns is theirs
                    return self.ref(obj)
                if keys and isinstance(keys[0].const, int):
                    for listed in layers.refs:
                        return self._looked_up(listed, keys, (), node)
                return self.content_elem(obj)
            keyed = [key for key in map(self.flat, keys) if key.toks]
            return blend(self.flat(self.ref(obj)), *keyed) if keyed else self.ref(obj, flags=WEIGHTS)
        if obj.kind == "instance":
            method = self.find(obj.data, "__getitem__")
            if method is not None:
                return self.tagged(self.call(method[0], [self.ref(obj), keys[0] if keys else NOTHING], {}, node), spans)
            if "#held" in obj.slots:
                return self.tagged(self.item(obj.slots["#held"], parts, node), spans)
        if obj.kind == "foreign":
            return self.of_environment(obj, keys)
        return self.tagged(self.flat(obj.slots.get("#content", NOTHING)), spans)

    @staticmethod
    def _column(obj: Obj, parts: list[Part]) -> Value | None:
        """edges[:, 0], edges[:, :1], edges[..., -1:]: one column of a tensor that was made of rows."""
        rows = obj.slots.get("#columns")
        if not isinstance(rows, Value) or rows.items is None or len(parts) != 2:
            return None
        every = parts[0].slice and parts[0].low is None and parts[0].high is None
        if not every and (parts[0].value is None or parts[0].value.const is not ...):
            return None
        last = parts[1]
        if not last.slice:
            place = last.value.const if last.value is not None else MISSING
            if not isinstance(place, int) or not -len(rows.items) <= place < len(rows.items):
                return None
            return rows.items[place]
        low, high = (each.const if each is not None else None for each in (last.low, last.high))
        if not all(each is None or isinstance(each, int) for each in (low, high)):
            return None
        chosen = rows.items[low:high]
        return chosen[0] if len(chosen) == 1 else None

    def of_environment(self, obj: Obj, keys: list[Value]) -> Value:
        """os.environ[name]"""
        if obj.data == "os.environ" and keys:
            return self.setting(keys[0], NOTHING)
        return self.ref(obj)

    def content_elem(self, obj: Obj) -> Value:
        raise NotImplementedError

    def advance(self, obj: Obj, sent: Value) -> Value:
        raise NotImplementedError

    def drained(self, obj: Obj) -> Value:
        raise NotImplementedError

    def setting(self, name: Value, default: Value) -> Value:
        raise NotImplementedError

    @staticmethod
    def _with(spans: tuple[Span, ...], more: tuple[Span, ...]) -> tuple[Span, ...]:
        from fairway.audit.flow.tokens import merged_spans

        return merged_spans(spans, more, keep_new=True)

    def _sliced_list(self, obj: Obj, parts: list[Part], spans: tuple[Span, ...], node: ast.AST | None) -> Value:
        exact = obj.slots.get("#items")
        part = parts[0]
        low, high = (part.low.const if part.low else None), (part.high.const if part.high else None)
        new = self.new("list", None, node)
        constant = all(each is None or isinstance(each, int) for each in (low, high))
        whole = not obj.slots.keys() & {"#open", "#elem"}
        shared = any(RANKED & each.env for each in (part.low, part.high) if each is not None)
        if isinstance(exact, Value) and exact.items is not None and not spans and constant and whole:
            kept = exact.items[low : high : part.step or 1]
            if kept or not exact.items or not shared:  # a share of the few turns that are walked may be nothing
                new.slots["#items"] = Value(items=kept)
                return self.ref(new)
        elem = self.tagged(self.element_of(obj), spans)
        cuts = self.cuts_of(parts)
        if not spans and cuts:
            elem = indexed(self.cut(elem, cuts, node), cuts)
        if shared:
            elem = of_rank(elem)
        limit = part.high.limit if part.high and part.high.limit is not None else high
        named = bool(elem.words) and self.plain(elem)  # of several files, the first
        if part.low is None and isinstance(limit, (int, float)) and (limit > 1 or (named and limit == 1)) and not spans:
            if named:
                self.trace.files.setdefault(part_of(limit), self.place(node))
            elem = limited(elem, float(limit))
            self.limit_here({part_of(float(limit))}, node)
        elif part.step > 1:
            if named:
                self.trace.files.setdefault(part_of(1 / part.step), self.place(node))
            elem = limited(elem, 1 / part.step)
            self.limit_here({part_of(1 / part.step)}, node)
        new.slots["#elem"] = elem
        return self.ref(new, spans=spans)

    def _looked_up(self, obj: Obj, keys: list[Value], spans: tuple[Span, ...], node: ast.AST | None) -> Value:
        key = keys[0] if keys else NOTHING
        found: Value | None = None
        if key.const is not MISSING and hashable(key.const):
            held = obj.slots.get(("k", key.const))
            found = held if isinstance(held, Value) else None
            exact = obj.slots.get("#items")
            items = exact.items or () if isinstance(exact, Value) else ()
            if found is None and isinstance(key.const, int) and -len(items) <= key.const < len(items):
                found = items[key.const]
        cell = cell_of(key)
        if found is None and cell and cell in obj.slots:
            held = obj.slots[cell]
            found = held if isinstance(held, Value) else None
        if found is None:
            found = self.element_of(obj)
            if key.const == 0:
                found = first_of(found)
            if found is NOTHING and "#factory" in obj.slots:
                found = self.call(obj.slots["#factory"], [], {}, node)
                self.add_content(obj, found, "#elem")
        if obj.slots.get("#learned"):
            flats = [self.flat(each) for each in keys]
            state = Value(states=frozenset((obj,)), knows=self.knows(obj), choices=obj.slots.get("#choices", 0))
            held = self.flat(found).but(toks=frozenset(), const=MISSING)  # whose tokens it holds, `knows` says
            found = blend(held, state, *flats).but(refs=found.refs)
        return self.tagged(found, spans) if spans else found

    @staticmethod
    def listed(obj: Obj) -> tuple[Value, ...] | None:
        """The elements of a list, where all are known one by one."""
        exact = obj.slots.get("#items")
        return exact.items if isinstance(exact, Value) and "#elem" not in obj.slots else None

    def element_of(self, obj: Obj) -> Value:
        """One value for all that a container may hold."""
        if obj.kind == "range":
            return NOTHING
        found: Value | None = None
        exact = obj.slots.get("#items")
        held = list(exact.items) if isinstance(exact, Value) and exact.items is not None else []
        held += [
            value
            for key, value in obj.slots.items()
            if isinstance(value, Value) and (key == "#elem" or isinstance(key, tuple))
        ]
        if obj.kind == "thing" and isinstance(obj.slots.get("#content"), Value):
            held.append(obj.slots["#content"])
        for value in held:
            found = value if found is None else join(found, value)
        return NOTHING if found is None else found

    def cut_tensor(self, value: Value, parts: list[Part], node: ast.AST | None) -> Value:
        """tensor[parts]: tokens by the loops that the index depends on, windows by their cuts."""
        keys = [self.flat(part.value) for part in parts if part.value is not None and part.value.const is MISSING]
        raw_keys = [key for key in keys if key.raw and not key.flags & MASK]  # logp[y >= 0] picks rows, no tokens
        if raw_keys and _asks(value, raw_keys[0]) and not self.quiet:  # logp[arange, y]
            return self.scored(self.following(value), raw_keys[0], node)
        keyed = [key for key in keys if key.toks]
        if keyed and not value.toks:
            return blend(value, *keyed).but(limit=None)
        spans: tuple[Span, ...] = value.spans
        for part in parts:
            more = self.slice_spans(part) if part.slice else ()
            if part.value is not None:
                more = self.flat(part.value).spans
            spans = self._with(spans, more)
        result = value
        if parts and parts[0].value is not None and parts[0].value.const is None and not parts[0].value.refs:
            result = result.but(flags=result.flags | ONE_ROW)
        masks = [cut for key in keys for cut in key.cuts]
        masks += [cut for part in parts if part.low is not None and part.low.flags & INDEXED for cut in part.low.cuts]
        cuts = self.cuts_of(parts) if not self._cuts_stream(value, parts) else frozenset()
        cuts |= before_share(parts[0]) if parts and value.flags & RAW else frozenset()
        if result.losses:  # the losses of one row are of its tokens alone
            result = result.but(toks=frozenset(narrowed(tok, spans) for tok in result.toks))
        result = self.cut(result, [*cuts, *masks], node)
        if result.toks and not result.losses:
            self._gaps(parts, node)
            old = {tok.part for tok in result.toks}
            toks = frozenset(self._part(narrowed(tok, spans), parts) for tok in result.toks)
            self.limit_here({tok.part for tok in toks} - old, node)
            result = result.but(toks=toks, spans=())
        elif self.plain(result):  # places in the data: which of them, the loops tell
            result = result.but(spans=spans)
        return result.but(const=MISSING, unit="", flags=result.flags | order_of(value, parts, keys))

    def limit_here(self, parts: Iterable[str], node: ast.AST | None) -> None:
        """The first line in which a constant lets only so many through."""
        for part in parts:
            self.trace.limits.setdefault(part, self.place(node))

    def _gaps(self, parts: list[Part], node: ast.AST | None) -> None:
        """Windows [w : w + length] that a loop cuts in longer steps: what lies between them is never read."""
        for part in parts:
            if part.slice and part.low is not None and part.high is not None and sparse(part.low, part.high):
                for loop, _, _ in part.low.spans:
                    if loop in self.strided:
                        self.trace.gaps.setdefault(loop, self.place(node))

    @staticmethod
    def _cuts_stream(value: Value, parts: list[Part]) -> bool:
        """Whether a slice moves along the stream with a loop, which its spans tell."""
        if value.toks and all(tok.wide for tok in value.toks):  # a window of its own: the slice is a part of it
            return False
        ends = [each for part in parts if part.slice for each in (part.low, part.high) if each is not None]
        if len(parts) == 2 and parts[0].value is not None and ends and all(each.less for each in ends):
            return False  # y[row, first - begin : end - begin]: places of a row, told from where its window begins
        return bool(value.flags & RAW) and any(each.spans or each.flags & LENGTH for each in ends)

    @staticmethod
    def _part(tok: Tok, parts: list[Part]) -> Tok:
        """What constants say of a slice: the shift by one, the first N alone."""
        behind = bool(parts) and parts[0].value is not None and parts[0].value.const is ...  # of the last axis
        for part in parts:
            in_row = len(parts) > 1 and part is parts[-1] and not parts[0].slice  # x[row, j]: a place of a window
            ends = [each for each in (part.low, part.high, part.value) if each is not None]
            if any(RANKED & each.env for each in ends):
                tok = replace(tok, ranked=True)
            if any(ORDERED & each.env for each in ends):
                tok = replace(tok, ordered=True)
            if not part.slice:
                limit = part.value.limit if part.value is not None else None
                if limit is not None and not (tok.part or behind or (in_row and limit <= WINDOW)):
                    tok = replace(tok, part=part_of(limit))
                continue
            if part.low is not None and part.low.flags & CLIPPED:
                tok = replace(tok, pushed=True)
            if part.low is not None and part.high is not None and overlaps(part.low, part.high):
                tok = replace(tok, wide=True, step=int(part.low.unit))
            elif part.low is not None and part.high is not None and step_of(part.low, part.high):
                tok = replace(tok, step=step_of(part.low, part.high))
            if part.low is not None and part.low.const == 1:
                tok = replace(tok, shift=tok.shift + 1)
            bounds = [part.high] if part.low is None or part.low.const == 0 else [part.low, part.high]
            for bound in bounds:
                few = bool(tok.part) and 1.0 <= float(tok.part) <= _FILES  # and of each file so many tokens
                if bound is None or (tok.part and not few):
                    continue
                limit = bound.limit
                if limit is None and isinstance(bound.const, int) and bound is part.high and len(bounds) == 1:
                    limit = bound.const
                if limit is not None and (limit > WINDOW or (bound.flags & INDEXED and not in_row and not few)):
                    tok = replace(tok, part=part_of(limit))
        return tok


def cell_of(key: Value) -> str:
    """Where a dict by files holds what it has of the files of one pattern: no other pattern's are found there. "" for
    other keys."""
    named = key.const is MISSING and not key.toks and any("*" in word for word in key.words)
    return f"#of {'|'.join(key.words)}" if named else ""


def is_same(one: Value, other: Value) -> bool:
    """Whether two values are one object, or equal constants."""
    if one.const is not MISSING and other.const is not MISSING:
        return bool(same(one.const, other.const))
    return one.const is other.const and len(one.refs) == 1 and one.refs == other.refs


def _asks(value: Value, key: Value) -> bool:
    """Whether reading a value at token ids asks what a state says of these tokens: of what it made of tokens of
    theirs. Counts of other texts that came with the weights, `counts[tokens]`, are looked up."""
    made = {tok.data for tok in value.toks}
    return value.active and not value.flags & GRAD and not made.isdisjoint(tok.data for tok in key.toks)
