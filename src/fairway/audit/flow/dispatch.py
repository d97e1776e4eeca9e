"""Methods: whose they are, and what calling them does."""

from __future__ import annotations

import ast

from fairway.audit.flow import events
from fairway.audit.flow.core import Frame
from fairway.audit.flow.foreign import SAYS
from fairway.audit.flow.functions import Functions
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import Part
from fairway.audit.flow.values import CLOCK, MISSING, NONE, NOTHING, WEIGHTS, Value, blend, join

_TELLS = SAYS | {"log", "print", "write", "add_scalar", "log_metric", "emit", "critical"}


class Dispatch(Functions):
    """method(base, name, args)"""

    def _unknown_call(self, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        raise NotImplementedError

    def _layer(self, obj: Obj, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        raise NotImplementedError

    def method(
        self, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        """base.name(*args)"""
        self.burn()
        text = self.text_method(base, name, args)
        if text is not None:
            return text
        special = self.special(base, name, args, node)
        if special is not None:
            return special
        if name == "tofile" and len(args) == 1 and self.flat(base).toks:  # read again, it is the array that was written
            self.write_to(self.path_of(args[0]), base, node)
            return NONE
        if not base.refs:
            return self._of_value(base, name, args, kwargs, node)
        result: Value | None = None
        if base.choices:  # what it writes hangs on what was chosen
            self.control.append(base.choices)
        try:
            for obj in sorted(base.refs, key=lambda each: each.number)[:6]:
                one = base if len(base.refs) == 1 else base.but(refs=frozenset((obj,)))
                found = self._method(obj, one, name, args, kwargs, node)
                result = found if result is None else join(result, found)
        finally:
            if base.choices:
                self.control.pop()
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
        if kind == "tensor" and name in ("extend", "append") and args:  # bytes that are put together
            return self._of_value(base, "add_", args, kwargs, node)
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
        if "#held" in obj.slots:
            return self.method(obj.slots["#held"], name, args, kwargs, node)
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
            return self.replaced(self.ref(obj), kwargs)
        if name == "_asdict":  # of a NamedTuple
            return self.copied(self.get(self.ref(obj), "__dict__", node))
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
            if "#held" in each.slots:
                return self._container_method(each, name, args, kwargs, node)
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

    def _container_method(
        self, obj: Obj, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        """What an object's own methods ask of the container that its class derives from: super().__setitem__(k, v)."""
        held: Value = obj.slots["#held"]
        if name == "__init__":
            self.fill(obj, self.container(obj.data), args, kwargs, node)
        elif name == "__setitem__" and len(args) == 2:
            self.put_item(held, [Part(args[0])], args[1], node)
        elif name == "__getitem__" and args:
            return self.item(held, [Part(args[0])], node)
        else:
            return self.method(held, name, args, kwargs, node)
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
