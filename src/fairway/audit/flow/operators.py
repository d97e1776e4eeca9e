"""Operators that are called by a name: `table.__setitem__(k, v)`, `operator.iadd(a, b)`, `attrgetter("loss")`, and
descriptors that are made by a call: `property(f)`."""

from __future__ import annotations

import ast
from typing import Any

from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import Elements, Part
from fairway.audit.flow.torches import Torches
from fairway.audit.flow.values import MISSING, NONE, NOTHING, Value, blend, join

_BINARY: dict[str, type[ast.operator]] = {
    "add": ast.Add, "sub": ast.Sub, "mul": ast.Mult, "truediv": ast.Div, "floordiv": ast.FloorDiv, "mod": ast.Mod,
    "matmul": ast.MatMult, "pow": ast.Pow, "and": ast.BitAnd, "or": ast.BitOr, "xor": ast.BitXor,
    "lshift": ast.LShift, "rshift": ast.RShift,
}  # fmt: skip
_COMPARED: dict[str, type[ast.cmpop]] = {
    "lt": ast.Lt, "le": ast.LtE, "gt": ast.Gt, "ge": ast.GtE, "eq": ast.Eq, "ne": ast.NotEq,
}  # fmt: skip
_ALIASES = {"multiply": "mul", "subtract": "sub", "divide": "truediv", "div": "truediv", "true_divide": "truediv"}
_ARRAYS = ("operator", "torch", "numpy", "jax", "mlx", "tinygrad", "cupy")  # libraries whose add(x, y) is x + y
_NAMES = {kind: name for name, kind in _BINARY.items()}
_KINDS = {"staticmethod": "static", "classmethod": "class", "property": "property", "cached_property": "property"}
_OWN = ("instance", "class", "super", "module")  # their own methods of such names come first


class Operators(Torches):
    """special(base, "__setitem__", args), and what the module `operator` has."""

    def method(
        self, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        raise NotImplementedError

    def binop(self, op: ast.operator, left: Value, right: Value, node: ast.AST | None) -> Value:
        """left op right, by a method of the script's own where a class of its has one."""
        name = _NAMES.get(type(op), "")
        for base, other, method in ((left, right, f"__{name}__"), (right, left, f"__r{name}__")):
            own = self._own(base, method, other, node)
            if own is not None:
                return own
        if isinstance(op, ast.BitOr) and _dicts(left) and _dicts(right):
            return self._with_more(self._shallow(left), right, node)
        return super().binop(op, left, right, node)

    def compare(self, op: ast.cmpop, left: Value, right: Value, node: ast.AST | None, texts: Any) -> Value:
        """left op right, as above."""
        name = next((name for name, kind in _COMPARED.items() if isinstance(op, kind)), "")
        own = self._own(left, f"__{name}__", right, node)
        return own if own is not None else super().compare(op, left, right, node, texts)

    def _own(self, base: Value, method: str, other: Value, node: ast.AST | None) -> Value | None:
        if not base.refs or any(obj.kind != "instance" for obj in base.refs):
            return None
        found = [(obj, self.find(obj.data, method)) for obj in sorted(base.refs, key=lambda each: each.number)]
        if any(each is None for _, each in found):
            return None
        results = [self.call(each[0], [self.ref(obj), other], {}, node) for obj, each in found if each is not None]
        result = results[0]
        for each in results[1:]:
            result = join(result, each)
        return result

    def changed_in_place(self, op: ast.operator, old: Value, value: Value, node: ast.AST | None) -> Value | None:
        """old op= value, of tensors, lists and objects that change themselves: what it is then; None for others."""
        cells = [obj for obj in old.refs if obj.kind == "tensor" or "#module" in obj.slots]
        if cells and len(cells) == len(old.refs):
            name = {"Add": "add_", "Sub": "sub_"}.get(type(op).__name__, "mul_")
            self.in_place(name, [old, value], {}, node)
            return old
        lists = [obj for obj in old.refs if obj.kind == "list"]
        if lists and isinstance(op, ast.Add):
            for obj in lists:
                self.list_method(obj, old, "extend", [value], node)
            return old
        if isinstance(op, ast.BitOr) and _dicts(old):
            return self._with_more(old, value, node)
        return self._own(old, f"__i{_NAMES.get(type(op), '')}__", value, node)

    def _with_more(self, held: Value, more: Value, node: ast.AST | None) -> Value:
        """Dicts with what others hold besides."""
        for obj in held.refs:
            self._update(obj, more, node)
        return held

    def spoken(self, value: Value, node: ast.AST | None) -> Value:
        """What is written of a value: of an object, what its own __str__ says, else the fields of a row."""
        objects = [obj for obj in value.refs if obj.kind == "instance" and "#module" not in obj.slots]
        if not objects:
            return value
        parts: list[Value] = []
        for obj in sorted(objects, key=lambda each: each.number)[:4]:
            names = ("__format__", "__str__", "__repr__")
            name, method = next(((each, own) for each in names if (own := self.find(obj.data, each))), ("", None))
            if method is not None:
                given = [Value(const="")] if name == "__format__" else []
                parts.append(self.flat(self.call(method[0], [self.ref(obj), *given], {}, node)))
            fields = [each for line in self.line_of(obj.data) for each in line.slots.get("#fields", ())]
            parts += [self.flat(obj.slots.get(each, NOTHING)) for each in fields if method is None]
        if not parts:
            return value
        said = blend(*parts).but(const=MISSING, refs=frozenset())
        return said.but(choices=said.choices | value.choices)

    def special(self, base: Value, name: str, args: list[Value], node: ast.AST | None) -> Value | None:
        """base.__name__(*args), where it stands for an operator; None where it does not, or is the script's own."""
        if not (name.startswith("__") and name.endswith("__")) or any(obj.kind in _OWN for obj in base.refs):
            return None
        return self.operator(name[2:-2], [base, *args], node)

    def outside_operator(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """operator.add(x, y), torch.add(x, y), numpy.multiply(x, y); None for all else."""
        library, _, last = name.partition(".")
        if library not in _ARRAYS or not last or kwargs:
            return None
        last = last.rpartition(".")[2]
        if library != "operator":
            last = _ALIASES.get(last, last)
            return self._binary(last, args, node) if last in ("add", "sub", "mul", "truediv", "matmul") else None
        return self.operator(last, args, node)

    def operator(self, name: str, args: list[Value], node: ast.AST | None) -> Value | None:
        """The operator of this name on its operands; None for what is none, or has too few."""
        if name == "setitem" and len(args) == 3:
            self.put_item(args[0], [Part(args[1])], args[2], node)
            return NONE
        if name == "getitem" and len(args) == 2:
            return self.item(args[0], [Part(args[1])], node)
        if name == "contains" and len(args) == 2:
            known = self.contains(args[1], args[0])
            return NOTHING if known is None else Value(const=known)
        if name in _COMPARED and len(args) == 2:
            return self.compare(_COMPARED[name](), args[0], args[1], node, (None, None))
        return self._binary(name.rstrip("_"), args, node)

    def _binary(self, name: str, args: list[Value], node: ast.AST | None) -> Value | None:
        for prefix in ("", "i", "r"):
            kind = _BINARY.get(name.removeprefix(prefix))
            if kind is None or not name.startswith(prefix) or len(args) != 2:
                continue
            left, right = reversed(args) if prefix == "r" else args
            changed = self.changed_in_place(kind(), left, right, node) if prefix == "i" else None
            return changed if changed is not None else self.binop(kind(), left, right, node)
        return None

    def _do_sum(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """sum(tallies, Tally()) of objects that say themselves what a sum of them is."""
        elements = self.elements(args[0], node) if name in ("sum", "builtins.sum") and args else Elements(None, NOTHING)
        each = [*(elements.exact or ()), elements.any]
        objects = [obj for one in each for obj in one.refs if obj.kind == "instance"]
        if not any(self.find(obj.data, own) for obj in objects for own in ("__add__", "__radd__")):
            return None
        start = [*args[1:2], kwargs["start"]][:1] if "start" in kwargs else args[1:2]
        return self.one_by_one(lambda a, b: self.binop(ast.Add(), a, b, node), elements, start, node)

    def _do_itemgetter(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return self.ref(self.new("getter", ("item", tuple(args)), node))

    def _do_attrgetter(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return self.ref(self.new("getter", ("attribute", tuple(args)), node))

    def _do_methodcaller(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args or not isinstance(args[0].const, str):
            return None
        return self.ref(self.new("getter", ("method", (args[0], tuple(args[1:]), kwargs)), node))

    def gotten(self, obj: Obj, args: list[Value], node: ast.AST | None) -> Value:
        """What a getter gives of its argument."""
        how, asked = obj.data
        base = args[0] if args else NOTHING
        if how == "method":
            return self.method(base, asked[0].const, list(asked[1]), asked[2], node)
        found = [self._one_of(how, base, each, node) for each in asked]
        return found[0] if len(found) == 1 else Value(items=tuple(found))

    def _one_of(self, how: str, base: Value, asked: Value, node: ast.AST | None) -> Value:
        if how == "item":
            return self.item(base, [Part(asked)], node)
        if not isinstance(asked.const, str):
            return self.flat(base).but(const=MISSING)
        for name in asked.const.split("."):
            base = self.get(base, name, node)
        return base

    def _do_property(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """property(f), staticmethod(f) called: the function as that kind of attribute."""
        given = args[0] if args else kwargs.get("fget", kwargs.get("func", NOTHING))
        functions = [obj for obj in given.refs if obj.kind == "function"]
        if len(functions) != 1:
            return None
        made = self.new("function", functions[0].data, node)
        made.slots.update(functions[0].slots)
        made.slots["#kind"] = _KINDS[name.rsplit(".", 1)[-1]]
        return self.ref(made)

    _do_staticmethod = _do_classmethod = _do_cached_property = _do_property


def _dicts(value: Value) -> bool:
    return bool(value.refs) and all(obj.kind == "dict" for obj in value.refs)
