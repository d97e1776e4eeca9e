"""What tensors do: losses, picks, reductions, copies and writes in place, as functions or as methods alike."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from fairway.audit.flow.arithmetic import Arithmetic
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import Part, sym_of
from fairway.audit.flow.known import (
    CASTS,
    CLOCKS,
    COPIES,
    COUNTED,
    KEYED,
    LEAST,
    LIKE,
    LOSSES,
    MADE,
    MAKES_ROW,
    PAIRS,
    PICKS,
    PLACES,
    RESETS,
    SIZES,
    VIEWS,
)
from fairway.audit.flow.ordering import by_length, in_order
from fairway.audit.flow.rows import over_rows, rows_of, spread
from fairway.audit.flow.shares import before_share
from fairway.audit.flow.tokens import Span, Tok
from fairway.audit.flow.values import (
    CLIPPED,
    CLOCK,
    DIGEST,
    GRAD,
    INDEXED,
    LENGTH,
    MISSING,
    MOVED,
    NO_OBJECTS,
    NOTHING,
    ONE_HOT,
    ONE_ROW,
    POSITIONS,
    RAW,
    SPREAD,
    WEIGHTS,
    Value,
    blend,
    join,
)


class Operations(Arithmetic):
    """Names that mean the same in every library."""

    def operation(self, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value | None:
        """The result of an operation that is known by its name; None for another."""
        if name in VIEWS or name in MAKES_ROW:
            return self._view(name, args, node)
        if name in CASTS and args:
            return self._cast(args[0])
        if args and (name == "repeat_interleave" or over_rows(name, args, kwargs)):  # a row for several windows
            for obj in args[0].refs:
                if "#leaf" in obj.slots:
                    self.heap.set(obj, "#rows", "one")
        if name in COPIES and args:
            return self._copy_of(name, args[0], node)
        if name in MADE:
            return self._made(name, args, kwargs, node)
        if name.endswith("_") and not name.startswith("_") and not name.endswith("__") and args:
            return self.in_place(name, args, kwargs, node)
        if name.startswith("_foreach_") and name.endswith("_") and args:  # each tensor of a list
            for obj in self.leaves(args[0]):
                self.in_place(name.removeprefix("_foreach_"), [self.ref(obj), *args[1:]], kwargs, node)
            return args[0]
        if name in SIZES:
            flat = self.flat(args[0], 1) if args else NOTHING
            if args and args[0].items is not None and not args[0].refs:
                return Value(const=len(args[0].items))
            count = self._count(args[0]) if args and name == "len" else None
            if count is not None:
                return Value(const=count)
            if name == "len" and args and isinstance(args[0].const, (str, bytes, tuple, list, dict)):
                return Value(const=len(args[0].const), env=args[0].env)
            return Value(flags=LENGTH | flat.flags & ONE_ROW, sym="size")
        if name == "arange":
            return self._arrangement(args)
        flats = [self.flat(each) for each in (*args, *kwargs.values())]
        return self._computed(name, args, flats, kwargs, node)

    def _arrangement(self, args: list[Value]) -> Value:
        """arange(low, high): places in the data, of a share where low is one of its places, or before it."""
        low, high = (self.flat(each) for each in args[:2]) if len(args) > 1 else (NOTHING, NOTHING)
        cuts = low.cuts if low.flags & INDEXED else before_share(Part(None, low, high, slice=True))
        return Value(flags=POSITIONS | (INDEXED if cuts else 0), spans=self._arranged(args), cuts=cuts, env=low.env)

    def _arranged(self, args: list[Value]) -> tuple[Span, ...]:
        """The iterations that arange(low, high) is cut by: those of the slice [low:high]."""
        flats = [self.flat(each) for each in args]
        numbers = len(flats) > 1 and all(self.plain(each) for each in flats[:2])
        if numbers and (flats[0].const is MISSING or flats[1].unit):
            return self.slice_spans(Part(None, flats[0], flats[1], slice=True))
        return blend(*flats).spans if flats else ()

    def _count(self, value: Value) -> int | None:
        """How many elements a list has, where that is known."""
        counts = set()
        for obj in value.refs:
            exact = obj.slots.get("#items")
            known = isinstance(exact, Value) and exact.items is not None and "#elem" not in obj.slots
            counts.add(len(exact.items or ()) if known and isinstance(exact, Value) else None)
        return counts.pop() if len(counts) == 1 else None

    def _computed(
        self, name: str, args: list[Value], flats: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value | None:
        if name in PICKS or LOSSES.search(name):
            found = self._loss(name, flats, node)
            if found is not None:
                return found
        if name in LEAST:
            return self._least(name, args, flats, kwargs, node)
        if name in ("where", "torch_where") and len(flats) >= 3:
            return self._where(flats, node)
        if name in PLACES:
            held = blend(*flats) if flats else NOTHING
            return Value(flags=LENGTH, spans=held.spans, choices=held.choices)
        if name in ("randint", "randperm", "random_integers"):
            drawn = frozenset((Tok("random"),))
            return Value(toks=drawn, flags=RAW, spans=self._arranged(args)) if name == "randint" else NOTHING
        if name in ("multinomial", "sample") and flats and _said_by_a_model(flats[0]):
            return Value(toks=frozenset((Tok("generated"),)), flags=RAW, knows=0)
        if name == "tobytes" and flats:
            return flats[0].but(flags=flats[0].flags | DIGEST, const=MISSING)
        if name == "one_hot" and flats:
            return flats[0].but(flags=flats[0].flags | ONE_HOT)
        if name in COUNTED and flats and flats[0].toks and flats[0].flags & RAW:
            table = self.new("tensor" if name != "Counter" else "dict", name, node)
            self.learn(table, flats[0].toks, "table", node)
            return self.ref(table)
        if name in ("log", "log2", "log10", "log1p") and len(flats) == 1:
            return self._logarithm(flats[0], node)
        if name in CLOCKS and not any(flat.toks for flat in flats):
            return Value(flags=CLOCK)
        if name in ("functional_call", "call_functional"):
            return self._functional(args, node)
        if name == "grad" and flats and (flats[0].toks or flats[0].losses):
            return self.gradient(flats[0])
        return None

    def _view(self, name: str, args: list[Value], node: ast.AST | None) -> Value:
        if not args:
            return NOTHING
        base = args[0]
        if name == "requires_grad_":
            return base if len(args) > 1 and args[1].const is False else self._started(base, node)
        first = args[1].const if len(args) > 1 else MISSING
        row = (name in MAKES_ROW and first == 0) or (name in ("reshape", "view") and first == 1)
        if name == "expand" and spread(args[1:]):
            return base.but(flags=base.flags & ~ONE_ROW | SPREAD)
        return base.but(flags=base.flags | ONE_ROW) if row else base

    def _started(self, base: Value, node: ast.AST | None) -> Value:
        """What takes gradients from here on. What a model has computed stays what it is."""
        flat = self.flat(base)
        if not base.refs and not (flat.toks or flat.states or flat.losses):
            return self.grown(base, node)
        for obj in base.refs:
            if obj.kind == "tensor":
                self.grow(obj)
        return base

    def _cast(self, base: Value) -> Value:
        weights = [obj for obj in base.refs if self.learner(obj) and (obj.kind == "tensor" or base.flags & WEIGHTS)]
        if weights:
            return self.snapshot(base)
        if any("#module" in obj.slots or obj.kind == "thing" for obj in base.refs):
            return base
        return self.flat(base).but(items=None) if base.refs or base.items is not None else base

    def _copy_of(self, name: str, base: Value, node: ast.AST | None) -> Value:
        tensors = [obj for obj in base.refs if obj.kind == "tensor"]
        if base.flags & WEIGHTS or (tensors and len(tensors) == len(base.refs)):
            made = self.snapshot(base)
            rows = {obj.slots["#rows"] for obj in tensors if "#rows" in obj.slots}
            for cell in made.refs if len(rows) == 1 or base.flags & SPREAD else ():
                cell.slots["#rows"] = "many" if base.flags & SPREAD else min(rows)
            return made.but(flags=base.flags & (WEIGHTS | ONE_ROW), spans=base.spans)
        if not base.refs:
            if base.const is not MISSING or base.items is not None:
                return base
            cell = self.new("tensor", None, node)
            cell.slots["#content"] = base
            return self.ref(cell, flags=base.flags & ONE_ROW)
        return self.copied(base) if name == "deepcopy" else self._shallow(base)

    def _shallow(self, base: Value) -> Value:
        refs = set()
        for obj in base.refs:
            if obj.kind in ("list", "dict"):
                new = self.new(obj.kind, obj.data)
                new.slots.update(obj.slots)
                refs.add(new)
            else:
                refs.add(obj)
        return base.but(refs=frozenset(refs))

    def _made(self, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        cell = self.new("tensor", None, node)
        shape = args[1:] if name.startswith("new_") else args
        rows = rows_of(shape, kwargs)
        if name in LIKE or name in ("tensor", "array", "new_tensor"):
            content = self.flat(args[0]) if args else NOTHING
            if name in LIKE:
                cell.slots["#rows"] = "one" if content.flags & ONE_ROW else "many"
                content = Value(flags=content.flags & ONE_ROW)
            cell.slots["#content"] = content.but(const=MISSING)
            columns = self._columns(args[0], node) if name not in LIKE and args else ()
            if columns:
                cell.slots["#columns"] = Value(items=columns)
        else:
            cell.slots["#rows"] = rows
        grows = kwargs.get("requires_grad")
        if grows is not None and grows.const is not False:
            cell.slots["#leaf"] = 1
        return self.ref(cell, flags=ONE_ROW if rows == "one" and cell.slots.get("#rows") == "one" else 0)

    def _columns(self, table: Value, node: ast.AST | None) -> tuple[Value, ...]:
        """The columns of `[[w.first, w.end] for w in windows]`, as one value for each; () where there are none."""
        if not any(obj.kind == "list" for obj in table.refs):
            return ()
        row = self.elements(table, node).any
        rows = [row.items] if row.items else [self.listed(obj) for obj in row.refs if obj.kind == "list"]
        if not rows or not all(rows) or len({len(each or ()) for each in rows}) > 1:
            return ()
        columns = []
        for column in zip(*(each or () for each in rows), strict=True):
            joined = column[0]
            for each in column[1:]:
                joined = join(joined, each)
            columns.append(joined)
        return tuple(columns) if all(map(self.plain, columns)) else ()

    # Losses and choices.
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
        result = blend(*flats) if flats else NOTHING
        losing = [each for each in flats if each.losses]
        stabiliser = len(args) == 1 and name.startswith(("max", "amax", "fmax", "nanmax")) and not args[0].refs
        if losing and not stabiliser and (len(losing) > 1 or len(args) == 1 or name not in PAIRS):
            result.choices |= self.choose(name, args, node)
            if "arg" in name:  # which one it is, not the loss
                return Value(choices=result.choices, env=result.env)
        refs = [obj for each in args for obj in each.refs if obj.kind in ("list", "generator", "dict")]
        if refs and name in ("min", "max", "sorted", "nsmallest", "nlargest"):
            elem = self.element_of(refs[0]) if refs[0].kind != "dict" else self.elements(self.ref(refs[0]), node).any
            key = kwargs.get("key")
            if refs[0].kind == "dict" and key is None and self.flat(elem).losses and not result.choices:
                result.choices |= self.choose(name, [elem], node)
            if key is not None and not result.choices:
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
        if condition.cuts and (one.toks or two.toks):
            result = self.cut(result, condition.cuts, node)
        elif condition.cuts and one.flags & POSITIONS and not one.cuts:  # where(mask, places, n)
            result.cuts = condition.cuts
        return result

    def _logarithm(self, value: Value, node: ast.AST | None) -> Value:
        tables = [state for state in value.states if "#module" not in state.slots and state.slots.get("#learned")]
        if value.active and not value.losses and tables:
            toks = value.toks.union(*self.asked)
            loss = self.scored(value, Value(toks=self.newest(toks), flags=RAW), node)
            self.logs |= loss.losses
            return loss
        return value.but(const=MISSING, refs=NO_OBJECTS)

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

    # In place.
    def in_place(self, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """x.add_(y) and its like; the result is x."""
        base, rest = args[0], [*args[1:], *kwargs.values()]
        cells = [obj for obj in base.refs if obj.kind == "tensor" or "#module" in obj.slots]
        flats = [self.flat(each) for each in rest]
        if name in ("detach_", "retain_grad_", "squeeze_", "unsqueeze_", "clamp_", "clip_", "resize_", "t_"):
            return base
        for obj in cells:
            self._write_one(obj, name, rest, flats, node)
        if not cells and flats:
            target = getattr(getattr(node, "func", None), "value", None)
            if isinstance(target, (ast.Name, ast.Attribute, ast.Subscript)):
                self.book(flats[0])
                held = self.flat(base)
                new = blend(*flats) if name in RESETS or name == "copy_" else blend(held, *flats)
                self.assign(target, new.but(const=MISSING))
                return new
        return base

    def _write_one(self, obj: Obj, name: str, rest: list[Value], flats: list[Value], node: ast.AST | None) -> None:
        if name in RESETS:
            self.write(obj, Value(choices=blend(*flats).choices if flats else 0), node, strong=True)
        elif name in ("copy_", "set_"):
            self.write(obj, flats[0] if flats else NOTHING, node, strong=True)
        elif name in KEYED or (name == "scatter_" and len(flats) > 2 and flats[-1].const is MISSING):
            keys = self.token_keys([each for each in rest if each.const is MISSING])
            if keys and "#leaf" not in obj.slots and obj.owner is None:
                self.entered(obj, keys, NOTHING, node)
            else:
                self.write(obj, blend(*flats) if flats else NOTHING, node)
        elif name == "scatter_":
            raw = next((each for each in flats if each.raw), NOTHING)
            self.write(obj, raw.but(flags=raw.flags | ONE_HOT) if raw.toks else blend(*flats), node)
        elif obj.kind == "tensor" and obj.owner is None and "#leaf" not in obj.slots and flats:
            old = self.content(obj)
            step = ast.Sub() if name == "sub_" else ast.Add()
            mixed = blend(*flats)
            new = self.binop(step, old, mixed, None) if old.losses or mixed.losses else blend(old, mixed)
            moved = MOVED if new.flags & GRAD and name in ("add_", "sub_") else 0
            kept = new.but(const=MISSING, choices=new.choices | self.chosen, flags=new.flags | moved)
            self.heap.set(obj, "#content", kept)
        elif flats:
            self.write(obj, blend(*flats), node)


def _said_by_a_model(value: Value) -> bool:
    """What a model made of tokens, or of a start that is none."""
    return bool(value.states) and not value.flags & RAW


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


def _less(args: list[Value]) -> frozenset[str]:
    found: frozenset[str] = frozenset()
    for each in args:
        found |= each.less
    return found
