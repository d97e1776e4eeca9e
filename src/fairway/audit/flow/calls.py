"""Calls: functions of the script are walked through with the values they are given."""

from __future__ import annotations

import ast
from typing import Any

from fairway.audit.flow import events
from fairway.audit.flow.core import DEPTH, Frame
from fairway.audit.flow.foreign import SAYS, Foreign
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.operations import LOSSES
from fairway.audit.flow.values import CLOCK, MISSING, NO_OBJECTS, NONE, NOTHING, WEIGHTS, Value, blend, join
from fairway.audit.reading.script import Script

_TELLS = SAYS | {"log", "print", "write", "add_scalar", "log_metric", "emit", "critical"}
_RECURSION = 2  # times a function may stand within itself


class Calls(Foreign):
    """Who is called, with what."""

    def block(self, body: list[ast.stmt]) -> bool:
        raise NotImplementedError

    def call(self, function: Value, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """function(*args, **kwargs)"""
        self.burn()
        result: Value | None = None
        for obj in sorted(function.refs, key=lambda each: each.number)[:4]:
            found = self._call(obj, args, kwargs, node)
            result = found if result is None else join(result, found)
        if result is None:
            return self._unknown_call("", [function, *args], kwargs, node)
        return result

    def _call(self, obj: Obj, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        kind = obj.kind
        if kind == "function":
            return self.inline(obj, args, kwargs, node)
        if kind == "bound":
            function, this = obj.data
            return self.inline(function, [this, *args], kwargs, node)
        if kind == "class":
            return self.make(obj, args, kwargs, node)
        if kind == "foreign":
            return self.outside_call(obj.data, args, kwargs, node)
        if kind == "method":
            base, name = obj.data
            return self.method(base, name, args, kwargs, node)
        if kind == "partial":
            function, first, named = obj.data
            return self.call(function, [*first, *args], {**named, **kwargs}, node)
        if kind in ("instance", "thing") and "#module" in obj.slots:
            return self.forward(obj, args, kwargs, node)
        if kind == "instance":
            found = self.find(obj.data, "__call__")
            if found is not None:
                return self.call(self.bound(found[0], self.ref(obj), obj.data), args, kwargs, node)
        if kind == "gradient":
            function, valued = obj.data
            value = self.flat(self.call(function, args, kwargs, node))
            grads = self.gradient(value)
            if valued == "last":
                return Value(items=(grads, value))
            return Value(items=(value, grads)) if valued else grads
        if kind == "kernel":
            return self._launch(args, kwargs, node)
        if kind == "wrapper":
            return args[0] if args else NOTHING
        if kind == "thing":
            return self._call_thing(obj, args, kwargs, node)
        return self._unknown_call("", [self.ref(obj), *args], kwargs, node)

    def _call_thing(self, obj: Obj, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        name = str(obj.data)
        if LOSSES.search(name) or "Loss" in name:
            found = self._loss("cross_entropy", [self.flat(each) for each in args], node)
            if found is not None:
                return found
        content = self.flat(obj.slots.get("#content", NOTHING))
        return self._unknown_call(name, [content, *args], kwargs, node)

    def _unknown_call(self, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """Nobody knows what is called: the result may hold all that went in."""
        flats = [self.flat(each) for each in (*args, *kwargs.values())]
        written = ast.unparse(node.func)[:80] if isinstance(node, ast.Call) else name
        if LOSSES.search(written):
            found = self._loss(written, flats, node)
            if found is not None:
                return found
        result = blend(*flats).but(const=MISSING) if flats else NOTHING
        if result.toks and result.states and any(each.flags & WEIGHTS or each.refs for each in args):
            self.unknown(node, f"call of {written or 'a value'} that is not known")
        if self.plain(result):
            result = self.tagged(result, self.here())
        return result

    def _launch(self, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """A kernel writes what it computes into the tensors it is given."""
        given = [*args, *kwargs.values()]
        flats = [self.flat(each) for each in given]
        result = blend(*flats) if flats else NOTHING
        loss = self._loss("", flats, node)
        for each in given:
            for obj in each.refs:
                if obj.kind == "tensor" and "#leaf" not in obj.slots and not self.content(obj).toks:
                    self.heap.set(obj, "#content", (loss or result).but(const=MISSING, refs=NO_OBJECTS))
        return NONE

    # Models.
    def forward(self, obj: Obj, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """model(x)"""
        for each in obj.slots.get("#prehooks", NOTHING).refs:
            self.call(self.ref(each), [self.ref(obj), Value(items=tuple(args))], {}, node)
        found = None
        if obj.kind == "instance":
            found = self.find(obj.data, "forward") or self.find(obj.data, "__call__")
        if found is not None:
            self.forwards += 1
            try:
                result = self.call(self.bound(found[0], self.ref(obj), obj.data), args, kwargs, node)
            finally:
                self.forwards -= 1
        else:
            result = self._layer(obj, args, kwargs, node)
        for each in obj.slots.get("#hooks", NOTHING).refs:
            given = Value(items=tuple(args))
            self.call(self.ref(each), [self.ref(obj), given, result], {}, node)
        if obj.owner is None or not self.forwards:
            toks = frozenset(tok for each in args for tok in self.flat(each).toks)
            if toks:
                self.note(events.Forward, node, state=obj, toks=toks)
        return result

    def _layer(self, obj: Obj, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """A layer of another library."""
        content = obj.slots.get("#content")
        flats = [self.flat(each) for each in (*args, *kwargs.values())]
        if isinstance(content, Value) and obj.kind == "thing" and (content.refs or content.items):
            result = args[0] if args else NOTHING
            parts = content.items or (self.content_elem(obj),)
            for part in parts:
                callable_part = [each for each in part.refs if each.kind in ("instance", "thing", "function", "bound")]
                if callable_part:
                    result = self.call(Value(refs=frozenset(callable_part)), [result], {}, node)
            return result
        name = str(obj.data) if obj.kind == "thing" else ""
        if "Loss" in name:
            found = self._loss("cross_entropy", flats, node)
            return found if found is not None else blend(*flats)
        root = obj.root
        choices = root.slots.get("#choices", 0)
        state = Value(states=frozenset((root,)), knows=self.knows(obj), choices=choices)
        labels = kwargs.get("labels")
        if labels is not None and len(flats) > 1:
            return self.scored(blend(flats[0], state), self.flat(labels), node)
        return blend(state, *flats)

    # Methods.
    def method(
        self, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        """base.name(*args)"""
        self.burn()
        text = self.text_method(base, name, args)
        if text is not None:
            return text
        if not base.refs:
            return self._of_value(base, name, args, kwargs, node)
        result: Value | None = None
        for obj in sorted(base.refs, key=lambda each: each.number)[:6]:
            one = base if len(base.refs) == 1 else base.but(refs=frozenset((obj,)))
            found = self._method(obj, one, name, args, kwargs, node)
            result = found if result is None else join(result, found)
        if result is not None and base.choices:
            return self._chosen_from(result, base.choices)
        return result if result is not None else NOTHING

    def _method(
        self, obj: Obj, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        kind = obj.kind
        if kind == "instance":
            return self._of_instance_method(obj, base, name, args, kwargs, node)
        if kind in ("module", "function") and name in obj.slots:
            return self.call(obj.slots[name], args, kwargs, node)
        if kind == "foreign":
            if isinstance(obj.slots.get(name), Value):
                return self.call(obj.slots[name], args, kwargs, node)
            return self.outside_call(f"{obj.data}.{name}", args, kwargs, node)
        if kind == "class":
            found = self.find(obj, name)
            if found is not None:
                return self.call(self._of_class(obj, self.ref(obj), name), args, kwargs, node)
            return self._class_method(obj, name, args, kwargs, node)
        if kind == "super":
            return self._super_method(obj, name, args, kwargs, node)
        if kind == "list":
            return self._listed(obj, base, name, args, kwargs, node)
        if kind == "generator":
            if isinstance(obj.data, Frame) and name in ("send", "__next__"):
                return self.advance(obj, args[0] if args else NONE)
            if name in ("send", "__next__"):
                return self.tagged(self.element_of(obj), self.since(obj.born))
            return self.flat(base)
        if kind == "dict":
            return self.dict_method(obj, base, name, args, kwargs, node)
        if kind == "thing" and "#module" in obj.slots and base.flags & WEIGHTS:
            return self._of_value(base, name, args, kwargs, node)
        if kind == "thing":
            if name in obj.slots and isinstance(obj.slots[name], Value):
                return self.call(obj.slots[name], args, kwargs, node)
            if self._tells(name, args) and "#path" not in obj.slots:
                return self._say(args, kwargs, node)
            if obj.data == "argparse":
                found_value = self.parser_method(obj, name, args, kwargs, node)
                if found_value is not None:
                    return found_value
            return self.thing_method(obj, base, name, args, kwargs, node)
        return self._of_value(base, name, args, kwargs, node)

    def _listed(
        self, obj: Obj, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        return self.list_method(obj, base, name, args, node)

    def _of_instance_method(
        self, obj: Obj, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        if isinstance(obj.slots.get(name), Value) and not name.startswith("#"):
            return self.call(obj.slots[name], args, kwargs, node)
        found = self.find(obj.data, name)
        own = found is not None and not (name == "step" and "#targets" in obj.slots)
        if found is not None and own:
            return self._own_method(obj, self.bound(found[0], self.ref(obj), obj.data), args, kwargs, node)
        if "#module" in obj.slots:
            if base.flags & WEIGHTS:
                return self._of_value(base, name, args, kwargs, node)
            known = self.module_method(obj, name, args, kwargs, node)
            if known is not None:
                return known
            if name.endswith("_") or name in ("clone", "detach", "numel", "size", "dim", "view", "reshape", "t"):
                return self._of_value(base.but(flags=WEIGHTS), name, args, kwargs, node)
        if "#targets" in obj.slots:
            known = self.optimizer_method(obj, name, args, kwargs, node)
            if known is not None:
                return known
        if name == "_replace":
            return self.ref(obj)
        flats = [self.flat(each) for each in (*args, *kwargs.values())]
        content = self.flat(obj.slots.get("#content", NOTHING))
        if any(each.toks or each.losses for each in flats):
            self.add_content(obj, blend(*flats))
        return blend(content, *flats)

    def _own_method(
        self, obj: Obj, method: Value, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        """A method of the script's own class; a model's that is given tokens runs the model."""
        toks = frozenset(tok for each in args for tok in self.flat(each).toks) if "#module" in obj.slots else None
        if not toks or obj.owner is not None:
            return self.call(method, args, kwargs, node)
        self.forwards += 1
        try:
            return self.call(method, args, kwargs, node)
        finally:
            self.forwards -= 1
            self.note(events.Forward, node, state=obj, toks=toks)

    def _class_method(
        self, obj: Obj, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        """A method that a class has from another library: Function.apply, Enum members..."""
        forward = self.find(obj, "forward")
        if name == "apply" and forward is not None:
            context = self.ref(self.new("thing", "context", node))
            return self.call(forward[0], [context, *args], kwargs, node)
        if name == "__init__" and args:
            return NONE
        return self._unknown_call(name, args, kwargs, node)

    def _super_method(
        self, obj: Obj, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        owner, this = obj.data
        for each in sorted(this.refs, key=lambda ref: ref.number):
            cls = each.data if each.kind == "instance" else each
            found = self.find(cls, name, after=owner) if isinstance(cls, Obj) else None
            if found is not None:
                return self.call(self.bound(found[0], self.ref(each), cls), args, kwargs, node)
            if each.kind != "instance":
                continue
            if name == "__init__":
                if "#targets" in each.slots and args:
                    self.heap.set(each, "#targets", args[0])
                if "#module" in each.slots:
                    for given in args:
                        self.adopt(each, given)
                return NONE
            if "#module" in each.slots:
                if name == "forward":
                    return self._layer(each, args, kwargs, node)
                known = self.module_method(each, name, args, kwargs, node)
                return known if known is not None else NONE
            if "#targets" in each.slots:
                known = self.optimizer_method(each, name, args, kwargs, node)
                return known if known is not None else NONE
        return NONE

    def _tells(self, name: str, args: list[Value]) -> bool:
        """Whether a method that nobody knows says a number: a logger's, a table's, a tracker's."""
        return name in _TELLS and any(self.flat(each).losses for each in args)

    def _of_value(
        self, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        """A method of a tensor, an array, a number."""
        if self._tells(name, args):
            return self._say(args, kwargs, node)
        if name == "backward":
            self.backward(base, node)
            return NONE
        if name in ("item", "tolist", "mean", "sum") and not base.refs and base.items is None:
            return base if base.const is MISSING else base.but(const=MISSING)
        if name in ("elapsed_time",):
            return Value(flags=CLOCK)
        found = self.operation(name, [base, *args], kwargs, node)
        if found is not None:
            return found
        if name in ("write_bytes", "write_text") and args:
            self.write_to(self.path_of(base), args[0], node)
            return NONE
        flats = [self.flat(base), *(self.flat(each) for each in (*args, *kwargs.values()))]
        if len(flats) > 1 and flats[0].active and any(each.cuts for each in flats[1:]):
            return self.cut(flats[0].but(const=MISSING), [cut for each in flats[1:] for cut in each.cuts], node)
        if name in ("add", "sub", "mul", "div", "subtract", "multiply", "true_divide") and len(flats) == 2:
            ops: dict[str, ast.operator] = {"add": ast.Add(), "sub": ast.Sub(), "mul": ast.Mult(), "div": ast.Div()}
            return self.binop(ops.get(name, ast.Mult()), flats[0], flats[1], None)
        loss = next((each for each in flats if each.losses), None)
        if loss is not None and flats[0] is loss:
            return loss.but(const=MISSING, choices=blend(*flats).choices)
        return blend(*flats).but(const=MISSING)

    # The script's own functions.
    def inline(self, obj: Obj, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """Walk through a function with the values it is given."""
        code, script, scope, closure, owner = obj.data
        depth = sum(1 for each in self.frames if each.node is code)
        if len(self.frames) >= DEPTH or depth >= _RECURSION:
            flats = [self.flat(each) for each in (*args, *kwargs.values())]
            if len(self.frames) >= DEPTH:
                self.unknown(node, "calls nested too deeply")
            return blend(*flats).but(const=MISSING) if flats else NOTHING
        local = self.heap.new("frame", getattr(code, "name", "lambda"))
        frame = Frame(local, script, scope, closure, code, owner, _outside(code))
        if node is not None and self.frames:
            self.frame.line = getattr(node, "lineno", self.frame.line)
        self._bind(obj, code.args, local, args, kwargs)
        if _is_coroutine(code):
            return self.ref(self.new("generator", frame, node))
        nest, frame.line = len(self.nest), code.lineno
        self.frames.append(frame)
        try:
            if isinstance(code, ast.Lambda):
                return self.evaluate(code.body)
            alive = self.block(code.body)
            return self._returned(frame, alive, code)
        finally:
            self.frames.pop()
            del self.nest[nest:]

    def _returned(self, frame: Frame, alive: bool, code: Any) -> Value:
        definite = frame.value
        values = [value for value, _ in frame.returns]
        pending = [change for _, change in frame.returns]
        self.settle(pending, alive or definite is not None)
        if definite is not None:
            values.append(definite)
        elif (alive and not values) or (alive and not all(value.items is not None or value.refs for value in values)):
            values.append(NONE)
        if frame.yields or _is_generator(code):
            made = self.new("generator", code.name, code)
            if frame.yields:
                elem = frame.yields[0]
                for each in frame.yields[1:]:
                    elem = join(elem, each)
                made.slots["#elem"] = elem
            for each in values:
                self.add_content(made, each, "#result")
            return self.ref(made)
        if not values:
            return NOTHING
        result = values[0]
        for each in values[1:]:
            result = join(result, each)
        return result

    def _bind(self, obj: Obj, spec: ast.arguments, local: Obj, args: list[Value], kwargs: dict[str, Value]) -> None:
        names = [each.arg for each in (*spec.posonlyargs, *spec.args)]
        slots, defaults = local.slots, obj.slots.get("#defaults", {})
        for name, value in zip(names, args, strict=False):
            slots[name] = value
        rest = args[len(names) :]
        if spec.vararg:
            slots[spec.vararg.arg] = Value(items=tuple(rest))
        known = {*names, *(each.arg for each in spec.kwonlyargs)}
        extra = self.heap.new("dict", None)
        for name, value in kwargs.items():
            if name in known:
                slots[name] = value
            elif name == "**":
                for each in known:
                    if each not in slots:
                        slots[each] = join(value, defaults[each]) if each in defaults else value
            else:
                extra.slots[("k", name)] = value
        if spec.kwarg:
            slots[spec.kwarg.arg] = self.ref(extra)
        for name in known:
            if name not in slots:
                slots[name] = defaults.get(name, NOTHING)


def _outside(code: Any) -> frozenset[str]:
    """The names that a function declares global or nonlocal."""
    cached = getattr(code, "_fairway_outside", None)
    if cached is None:
        names: set[str] = set()
        waiting: list[ast.AST] = list(code.body) if isinstance(code.body, list) else []
        while waiting:
            each = waiting.pop()
            if isinstance(each, (ast.Global, ast.Nonlocal)):
                names.update(each.names)
            if not isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
                waiting += ast.iter_child_nodes(each)
        cached = frozenset(names)
        code._fairway_outside = cached
    return cached


def _is_generator(code: Any) -> bool:
    """Whether a function yields."""
    cached = getattr(code, "_fairway_yields", None)
    if cached is None:
        cached = False
        waiting: list[ast.AST] = list(code.body) if isinstance(code.body, list) else []
        while waiting and not cached:
            each = waiting.pop()
            if isinstance(each, (ast.Yield, ast.YieldFrom)):
                cached = True
            elif not isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
                waiting += ast.iter_child_nodes(each)
        code._fairway_yields = cached
    return bool(cached)


def _is_coroutine(code: Any) -> bool:
    """Whether a function uses what is sent to it: a yield that is not a statement of its own."""
    cached = getattr(code, "_fairway_coroutine", None)
    if cached is None:
        cached = False
        if _is_generator(code) and isinstance(code, ast.FunctionDef):
            alone = {id(each.value) for each in ast.walk(code) if isinstance(each, ast.Expr)}
            cached = any(isinstance(each, ast.Yield) and id(each) not in alone for each in ast.walk(code))
        code._fairway_coroutine = cached
    return bool(cached)


__all__ = ["Calls", "Script"]
