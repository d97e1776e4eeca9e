"""What tensors do: views, copies, what is made, and writes in place, as functions or as methods alike."""

from __future__ import annotations

import ast

from fairway.audit.flow import events
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import Part
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
    PICKS,
    PLACES,
    RESETS,
    SIZES,
    VIEWS,
)
from fairway.audit.flow.picking import Picking
from fairway.audit.flow.rows import broadcast, over_rows, rows_of, spread
from fairway.audit.flow.shares import before_share
from fairway.audit.flow.tokens import Span, Tok
from fairway.audit.flow.values import (
    CLOCK,
    DIGEST,
    GRAD,
    INDEXED,
    LENGTH,
    MISSING,
    MOVED,
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

_CURVES = frozenset(
    ("log", "log2", "log10", "log1p", "exp", "expm1", "sqrt", "rsqrt", "sigmoid", "tanh", "softmax", "log_softmax")
)


class Operations(Picking):
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
        found = self._computed(name, args, flats, kwargs, node)
        if found is not None and found.flags & RAW and name in _CURVES:  # log counts[token] is no token
            return found.but(flags=found.flags & ~RAW)
        return found

    def _run_of_no_class(self, ids: Value, weights: Value, node: ast.AST | None) -> None:
        """F.embedding(tokens, w["embed"]) in a function of a model that is none of a class: whoever calls that function
        runs the model."""
        ids, weights = (ids, weights) if ids.raw else (weights, ids)
        if not ids.raw or not weights.states:
            return
        stand = self._stand(node)
        way = stand["stack"]
        if len(way) > 1:
            stand |= {"stack": way[:-1], "place": way[-2]}
        self.trace.events.append(events.Forward(**stand, toks=ids.toks))

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
        if name == "embedding" and len(flats) > 1 and not self.forwards:
            self._run_of_no_class(flats[0], flats[1], node)
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
        if name in ("log", "log2", "log10") and len(flats) == 1:
            return self._logarithm(flats[0], node)
        again = name in ("softmax", "log_softmax") or (name in ("exp", "exp2") and len(flats) == 1)
        if again and flats and flats[0].losses and not flats[0].losses & ~self.logs:
            return self.rows_again(flats[0])
        if name in CLOCKS and not any(flat.toks for flat in flats):
            self.note(events.Call, node, name=name)
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
            settings = obj.kind == "instance" and not obj.slots.keys() & {"#module", "#targets"}
            if obj.kind in ("list", "dict") or settings:
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
        if name in LIKE or name in ("tensor", "array", "new_tensor", "bytearray"):
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
            if rows == "one" and broadcast(shape):
                cell.slots["#broadcast"] = 1
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

    # In place.
    def in_place(self, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """x.add_(y) and its like; the result is x."""
        base, rest = args[0], [*args[1:], *kwargs.values()]
        cells = [obj for obj in base.refs if obj.kind == "tensor" or "#module" in obj.slots]
        flats = [self.flat(each) for each in rest]
        if name in ("detach_", "retain_grad_", "squeeze_", "unsqueeze_", "clamp_", "clip_", "resize_", "t_"):
            return base
        target = getattr(getattr(node, "func", None), "value", None)
        if not cells and (name in KEYED or name == "scatter_"):
            cells = self._parts_written(target)
        for obj in cells:
            self._write_one(obj, name, rest, flats, node)
        if not cells and flats and isinstance(target, (ast.Name, ast.Attribute, ast.Subscript)):
            self.book(flats[0])
            held = self.flat(base)
            new = blend(*flats) if name in RESETS or name == "copy_" else blend(held, *flats)
            self.overwrite(target, new.but(const=MISSING))
            return new
        return base

    def _parts_written(self, target: ast.expr | None) -> list[Obj]:
        """The tables of which a part is filled: `counts[b].index_put_(...)`, or by the name of that part."""
        if isinstance(target, ast.Name):
            target = self.frame.views.get(target.id)
        if not isinstance(target, ast.Subscript):
            return []
        return [obj for obj in self.evaluate(target.value).refs if obj.kind == "tensor"]

    def given_out(self, result: Value, out: Value, node: ast.Call) -> Value:
        """torch.f(x, out=y): what comes out is written into y."""
        target = next((each.value for each in node.keywords if each.arg == "out"), None)
        if any(obj.kind == "tensor" for obj in out.refs):
            return self.in_place("copy_", [out, result], {}, node)
        if isinstance(target, (ast.Name, ast.Attribute, ast.Subscript)):
            self.overwrite(target, result)
        return result

    def _write_one(self, obj: Obj, name: str, rest: list[Value], flats: list[Value], node: ast.AST | None) -> None:
        if name in RESETS:
            self.write(obj, Value(choices=blend(*flats).choices if flats else 0), node, strong=True)
        elif name in ("copy_", "set_"):
            self.write(obj, flats[0] if flats else NOTHING, node, strong=True)
        elif name == "scatter_reduce_" and any(each.const == "amin" for each in rest):
            pair = [self.content(obj), *(each for each in flats if each.losses)]
            self.write(obj, self.flat(self._least("minimum", pair, pair, {}, node)), node)
        elif name in KEYED or (name == "scatter_" and len(flats) > 2 and flats[-1].const is MISSING):
            keys = self.token_keys([each for each in rest if each.const is MISSING], node)
            shares = bool(flats) and flats[-1].active and not flats[-1].losses  # votes of states, shared out once
            if keys and "#leaf" not in obj.slots and obj.owner is None and not shares:
                self.entered(obj, keys, NOTHING, node)
            else:
                # What is counted in buckets is no mask of the places, whichever levels the buckets are told by.
                self.write(obj, blend(*flats).but(cuts=frozenset()) if flats else NOTHING, node)
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
