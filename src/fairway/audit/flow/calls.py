"""Calls: functions of the script are walked through with the values they are given."""

from __future__ import annotations

import ast

from fairway.audit.flow import events
from fairway.audit.flow.dispatch import Dispatch
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.known import LOSSES
from fairway.audit.flow.values import MISSING, NO_OBJECTS, NONE, NOTHING, WEIGHTS, Value, blend, join


class Calls(Dispatch):
    """Who is called, with what."""

    def call(self, function: Value, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """function(*args, **kwargs)"""
        self.burn()
        result: Value | None = None
        for obj in sorted(function.refs, key=lambda each: each.number)[:8]:
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
            function, valued, place = obj.data
            value = self.flat(self.call(function, self.differentiated(args, place, node), kwargs, node))
            grads = self.gradient(value)
            if valued == "last":
                return Value(items=(grads, value))
            return Value(items=(value, grads)) if valued else grads
        if kind == "getter":
            return self.gotten(obj, args, node)
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
            answer = self.call(self.ref(each), [self.ref(obj), Value(items=tuple(args)), result], {}, node)
            result = self._instead(answer, result)
        if obj.owner is None or not self.forwards:
            toks = frozenset(tok for each in args for tok in self.flat(each).toks)
            if toks:
                self.note(events.Forward, node, state=obj, toks=toks)
        return result

    @staticmethod
    def _instead(answer: Value, result: Value) -> Value:
        """What a module gives: its hook's answer, where that is anything."""
        nothing = answer is NOTHING or (answer.const is None and not answer.refs and answer.items is None)
        return result if nothing else answer

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
