"""Builtins, itertools and functools."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from fairway.audit.flow.core import Frame
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import Elements
from fairway.audit.flow.known import MODULE_NAMES
from fairway.audit.flow.opening import Opening
from fairway.audit.flow.values import (
    MISSING,
    NONE,
    NOTHING,
    Value,
    join,
)

_TYPES: dict[str, type] = {
    "bool": bool, "int": int, "float": float, "str": str, "dict": dict, "list": list, "tuple": tuple, "set": set,
}  # fmt: skip


class Builtins(Opening):
    """Functions of the language itself and of its nearest libraries."""

    def run_text(self, args: list[Value], node: ast.AST | None) -> Value:
        raise NotImplementedError

    def turned(self, element: Value, loop: int, turn: int) -> Value:
        raise NotImplementedError

    def _do_range(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        bounds = [Value(const=0), *args] if len(args) == 1 else list(args)
        bounds += [Value(const=1)] * (3 - len(bounds))
        return self.ref(self.new("range", tuple(bounds[:3]), node))

    _do_trange = _do_range
    _do_prange = _do_range

    def _do_enumerate(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        elements = self.elements(args[0] if args else NOTHING, node)
        new = self.new("list", "enumerate", node)
        if elements.exact is not None:
            pairs = tuple(Value(items=(Value(const=n), each)) for n, each in enumerate(elements.exact))
            new.slots["#items"] = Value(items=pairs)
        else:
            new.slots["#elem"] = Value(items=(Value(unit="1", sym="@"), elements.any))
        return self.ref(new)

    def _do_zip(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        columns = self._turned_over(args, node)
        if columns is not None:
            return columns
        parts = [self.elements(each, node) for each in args]
        exact = [each.exact for each in parts]
        new = self.new("list", None, node)
        if parts and all(each is not None for each in exact):
            rows = zip(*(each or () for each in exact), strict=False)
            new.slots["#items"] = Value(items=tuple(Value(items=row) for row in rows))
        elif len(parts) > 1 and (names := parts[0].exact) and all(isinstance(each.const, str) for each in names):
            # zip(names, sums.tolist()): as many numbers as there are names for them
            others = tuple(each.any for each in parts[1:])
            new.slots["#items"] = Value(items=tuple(Value(items=(name, *others)) for name in names))
        else:
            new.slots["#elem"] = Value(items=tuple(each.any for each in parts))
        return self.ref(new)

    def _do_divmod(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) != 2:
            return None
        count, size = args
        rest = self.again(count, size, self.binop(ast.Mod(), count, size, None), node.args[1])
        return Value(items=(self.binop(ast.FloorDiv(), count, size, None), rest))

    def _turned_over(self, args: list[Value], node: Any) -> Value | None:
        """zip(*rows), where one value stands for all rows: a list for each of its columns."""
        given = getattr(node, "args", [])
        if len(given) != 1 or not isinstance(given[0], ast.Starred) or len(args) != 1:
            return None
        row = args[0].items if args[0].items is not None else self.row_of(args[0])
        if not row:
            return None
        columns = self.new("list", None, node)
        columns.slots["#items"] = Value(items=tuple(self._list_of(each, node) for each in row))
        return self.ref(columns)

    def _do_list(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        new = self.new("list", None, node)
        if not args:
            new.slots["#items"] = Value(items=())
            return self.ref(new)
        elements = self.elements(args[0], node)
        if elements.exact is not None:
            new.slots["#items"] = Value(items=elements.exact)
        else:
            new.slots["#elem"] = elements.any
            if elements.any.limit is not None:
                new.slots["#elem"] = elements.any.but(limit=elements.any.limit)
        return self.ref(new, spans=args[0].spans)

    def _do_tuple(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        if args and args[0].items is not None:
            return args[0]
        return self._do_list(name, args, kwargs, node)

    _do_set = _do_frozenset = _do_deque = _do_reversed = _do_Queue = _do_SimpleQueue = _do_list

    def _do_iter(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args:
            return None
        new = self.new("list", "iterator", node)
        called = len(args) == 2 and name.endswith("iter")  # iter(function, sentinel): what it returns, again and again
        new.slots["#elem"] = self.call(args[0], [], {}, node) if called else self.elements(args[0], node).any
        return self.ref(new)

    _do_cycle = _do_iter

    def _do_next(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args:
            return None
        born = min((obj.born for obj in args[0].refs), key=len, default=())
        for obj in args[0].refs:
            if obj.kind == "instance":
                method = self.find(obj.data, "__next__")
                if method is not None:
                    return self.call(method[0], [self.ref(obj)], {}, node)
            if isinstance(obj.data, Frame):
                return self.advance(obj, NONE)
        return self.tagged(self.elements(args[0], node).any, self.since(born))

    def _do_dict(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        new = self.new("dict", None, node)
        for each in args:
            self._update(new, each, node)
        for key, value in kwargs.items():
            new.slots[("k", key)] = value
        return self.ref(new)

    _do_OrderedDict = _do_dict

    def _do_asdict(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """dataclasses.asdict: a copy of what the fields hold."""
        held = self._do_vars(name, args, kwargs, node)
        return self.copied(held) if held is not None else None

    def _do_vars(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """vars(args): its names and values"""
        held = any(obj.kind == "instance" or obj.data == "namespace" for obj in args[0].refs) if args else False
        return self.get(args[0], "__dict__", node) if held else None

    def _do_Counter(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        new = self._do_dict(name, [], {}, node)
        for each in args:
            flat = self.flat(each)
            if flat.raw:
                for obj in new.refs:
                    self.learn(obj, flat.toks, "table", node)
        return new

    def _do_defaultdict(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        new = self.new("dict", None, node)
        if args:
            new.slots["#factory"] = args[0]
        return self.ref(new)

    def _do_field(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """A field of a dataclass: its default, or what makes one for each instance."""
        maker = kwargs.get("default_factory", kwargs.get("factory"))
        if maker is None:
            return kwargs.get("default")
        made = self.new("thing", "factory", node)
        made.slots["#factory"] = maker
        return self.ref(made)

    _do_Field = _do_field

    def _do_fields(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """dataclasses.fields(cls)"""
        if "dataclasses" not in name or not args:
            return None
        found = []
        for obj in args[0].refs:
            cls = obj.data if obj.kind == "instance" else obj
            if cls.kind != "class":
                continue
            for field in dict.fromkeys(
                f for each in reversed(self.line_of(cls)) for f in each.slots.get("#fields", ())
            ):
                made = self.new("thing", "field", node)
                made.slots["name"] = Value(const=field)
                made.slots["type"] = self._type_of(cls, field)
                self._defaulted(made, cls, field)
                found.append(self.ref(made))
        listed = self.new("list", None, node)
        listed.slots["#items"] = Value(items=tuple(found))
        return self.ref(listed)

    def _defaulted(self, made: Obj, cls: Obj, field: str) -> None:
        """A field knows its default, or what makes one: entry.default, entry.default_factory."""
        default = self.find(cls, field)
        if default is None:
            return
        maker = next((obj.slots["#factory"] for obj in default[0].refs if "#factory" in obj.slots), None)
        made.slots["default" if maker is None else "default_factory"] = default[0] if maker is None else maker

    def _type_of(self, cls: Obj, field: str) -> Value:
        """The type that a class gives a field, where it is a builtin's or a class: a name, or the text of one."""
        for each in self.line_of(cls):
            for line in getattr(each.data, "body", []) if each.kind == "class" else []:
                if isinstance(line, ast.AnnAssign) and getattr(line.target, "id", "") == field:
                    kind = line.annotation.value if isinstance(line.annotation, ast.Constant) else None
                    kind = line.annotation.id if isinstance(line.annotation, ast.Name) else kind
                    if not isinstance(kind, str) or not kind.isidentifier():
                        return NOTHING
                    known = kind in _TYPES
                    return self.outside(f"builtins.{kind}") if known else self.evaluate(ast.Name(kind, ast.Load()))
        return NOTHING

    def _do_get_type_hints(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """typing.get_type_hints(cls): the types of its fields, by name"""
        made = self.new("dict", None, node)
        for obj in args[0].refs if args else ():
            cls = obj.data if obj.kind == "instance" else obj
            for each in reversed(self.line_of(cls) if cls.kind == "class" else []):
                made.slots.update({("k", field): self._type_of(cls, field) for field in each.slots.get("#fields", ())})
        return self.ref(made)

    def _do_cast(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return args[1] if "typing" in name and len(args) == 2 else None

    def _do_replace(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if name.startswith("os.") and len(args) == 2:
            return self._do_rename(name, args, kwargs, node)
        if "dataclasses" not in name or not args:
            return None
        return self.replaced(args[0], kwargs)

    def _do_rename(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """os.rename(here, there), and what copies a file."""
        if not name.startswith(("os.", "shutil.")) or len(args) != 2:
            return None
        self.move(self.path_of(args[0]), self.path_of(args[1]))
        return NONE

    _do_renames = _do_move = _do_copyfile = _do_copy2 = _do_rename

    def replaced(self, value: Value, kwargs: dict[str, Value]) -> Value:
        """A copy of a row with some fields changed."""
        made = self._shallow_instance(value)
        for obj in made.refs:
            obj.slots.update(kwargs)
        return made

    def _shallow_instance(self, value: Value) -> Value:
        refs = set()
        for obj in value.refs:
            new = self.new(obj.kind, obj.data)
            new.slots.update(obj.slots)
            refs.add(new)
        return value.but(refs=frozenset(refs))

    def _do_groupby(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """itertools.groupby: (key, group) pairs; each group is a run of the elements"""
        if not args:
            return None
        group = self._list_of(self.elements(args[0], node).any, node)
        return self._list_of(Value(items=(Value(unit="1", sym="@"), group)), node)

    def _do_islice(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """The next elements: others in each iteration of the loops since the iterator was made."""
        if not args:
            return None
        born = min((obj.born for obj in args[0].refs), key=len, default=())
        spans = self.since(born)
        elem = self.tagged(self.elements(args[0], node).any, (*args[0].spans, *spans))
        stop = args[1].const if len(args) == 2 else MISSING
        if stop == 1:
            alone = self.new("list", None, node)
            alone.slots["#items"] = Value(items=(elem,))
            return self.ref(alone)
        if isinstance(stop, int) and not spans:
            elem = self.parted(elem, f"{stop}")
        return self._list_of(elem, node)

    _do_batched = _do_islice

    def _do_slice(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        bounds = [NONE, *args] if len(args) == 1 else list(args)
        texts = [getattr(each, "id", "") or ast.unparse(each)[:60] for each in getattr(node, "args", [])]
        texts = ["", *texts] if len(args) == 1 else texts
        return self.ref(self.new("slice", (tuple(bounds[:2]), tuple(texts[:2])), node))

    def _do_fromkeys(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return self._do_dict(name, [], {}, node)

    def _do_map(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        elements = [self.elements(each, node) for each in args[1:]]
        if len(elements) == 1 and elements[0].exact is not None:
            new = self.new("list", None, node)
            new.slots["#items"] = Value(items=tuple(self.call(args[0], [each], {}, node) for each in elements[0].exact))
            return self.ref(new)
        return self._list_of(self.call(args[0], [each.any for each in elements], {}, node), node)

    def _do_filter(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self._list_of(self.elements(args[1], node).any, node) if len(args) > 1 else None

    _do_takewhile = _do_dropwhile = _do_filterfalse = _do_filter

    def _do_starmap(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        each = self.elements(args[1], node).any
        given = list(each.items) if each.items is not None else [self.elements(each, node).any]
        return self._list_of(self.call(args[0], given, {}, node), node)

    def _do_chain(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        found = NOTHING
        for each in args:
            found = join(found, self.elements(each, node).any)
        return self._list_of(found, node)

    def _do_from_iterable(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args:
            return None
        return self._list_of(self.elements(self.elements(args[0], node).any, node).any, node)

    def _do_reduce(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        runs = ("function", "bound", "partial", "foreign", "wrapper", "method")
        if name.startswith("torch.distributed") or not args or not any(obj.kind in runs for obj in args[0].refs):
            return None
        elements = self.elements(args[1], node) if len(args) > 1 else Elements(None, NOTHING)
        return self.one_by_one(lambda a, b: self.call(args[0], [a, b], {}, node), elements, args[2:3], node)

    def one_by_one(
        self, step: Callable[[Value, Value], Value], elements: Elements, start: list[Value], node: Any
    ) -> Value:
        """What is left of elements after a step with each: those that are known, or two turns of any of them."""
        if elements.exact:
            state, *rest = [*start, *elements.exact]
            for each in rest:
                state = step(state, each)
            return state
        state = start[0] if start else elements.any
        loop = self.loop_id(node)
        self.turns[loop] = 2
        for turn in (1, 2):
            self.nest.append((loop, turn))
            state = step(state, self.turned(elements.any, loop, turn))
            self.nest.pop()
        return state

    def _do_partial(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self.ref(self.new("partial", (args[0], tuple(args[1:]), dict(kwargs)), node)) if args else None

    def _do_getattr(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        if isinstance(args[1].const, str):
            if len(args) > 2 and self._lacks(args[0], args[1].const):
                return args[2]
            found = self.get(args[0], args[1].const, node)
            fallback = len(args) > 2 and found is NOTHING
            return args[2] if fallback else found
        found = NOTHING
        for obj in args[0].refs:
            for held in self.held(obj)[:40] if obj.kind in ("instance", "thing", "module", "class") else []:
                found = join(found, held)
        if any("#module" not in obj.slots for obj in args[0].refs):
            self.unknown(node, "getattr with a name that is computed")
        return found

    def _lacks(self, value: Value, name: str) -> bool:
        """Whether a module of the script's own has nothing of this name: neither set on it, nor of its classes, nor
        torch's."""
        if len(value.refs) != 1 or name in MODULE_NAMES:
            return False
        (obj,) = value.refs
        if obj.kind != "instance" or "#module" not in obj.slots or self._has(value, name):
            return False
        outside = [each.data for each in self.line_of(obj.data)[1:] if each.kind == "foreign"]
        plain = all(str(each).rsplit(".", 1)[-1] == "Module" for each in outside)
        return plain and self.find(obj.data, "__getattr__") is None

    def _do_setattr(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        if len(args) == 3 and isinstance(args[1].const, str):
            self.put(args[0], args[1].const, args[2], node)
        elif len(args) == 3:
            for obj in args[0].refs:
                if "#module" in obj.slots:
                    self.write(obj, args[2], node)
        return NONE

    def _do_hasattr(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) == 2 and isinstance(args[1].const, str) and self._has(args[0], args[1].const):
            return Value(const=True)
        return NOTHING

    def _do_isinstance(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        if len(args) == 2:
            plain = _kinds_of(args[1])
            if plain and isinstance(args[0].const, (bool, int, float, str)):
                return Value(const=isinstance(args[0].const, plain))
            kinds = [obj for obj in args[1].refs if obj.kind == "class"]
            held = _is_held(args[0], plain) if plain else None
            if held is not None:
                return Value(const=held)
            for obj in args[0].refs:
                if obj.kind == "instance" and len(args[0].refs) == 1 and len(kinds) == 1 and not args[1].items:
                    return Value(const=kinds[0] in self.line_of(obj.data))
        return NOTHING

    def _do_is_dataclass(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        given = args[0] if args else NOTHING
        if not given.refs:
            return Value(const=False) if given.const is not MISSING else NOTHING
        if not all(obj.kind in ("instance", "class", "foreign") for obj in given.refs):
            return NOTHING
        kinds = [obj.data if obj.kind == "instance" else obj for obj in given.refs]
        fields = {any(each.slots.get("#fields") for each in self.line_of(kind)) for kind in kinds}
        return Value(const=fields.pop()) if len(fields) == 1 else NOTHING

    def _do_type(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        classes = frozenset(obj.data for obj in args[0].refs if obj.kind == "instance") if args else frozenset()
        if len(args) == 1 and isinstance(args[0].const, (bool, int, float, str)):  # type(default)(text)
            return self.outside(f"builtins.{type(args[0].const).__name__}")
        return Value(refs=classes) if classes and len(args) == 1 else None

    def _do_exec(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self.run_text(args, node) if name in ("builtins.exec", "builtins.eval", "exec", "eval") else None

    _do_eval = _do_exec

    def _do_any(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if name.startswith("builtins") and args:
            return self.flat(args[0]).but(const=MISSING)
        return None

    _do_all = _do_any

    def _do_namedtuple(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        cls = self.new("class", ast.ClassDef("namedtuple", [], [], [], []), node)
        fields = args[1] if len(args) > 1 else NOTHING
        names: tuple[str, ...] = ()
        if isinstance(fields.const, str):
            names = tuple(fields.const.replace(",", " ").split())
        elif fields.refs or fields.items:
            exact = self.elements(fields, node).exact or ()
            names = tuple(str(each.const) for each in exact)
        cls.slots["#fields"] = names
        return self.ref(cls)


def _is_held(value: Value, plain: tuple[type, ...]) -> bool | None:
    """Whether a dict or a list is of these kinds: a list may be a tuple to the walk."""
    kinds = {obj.kind for obj in value.refs}
    if not kinds and value.losses and not {dict, set}.isdisjoint(plain) and {int, float}.isdisjoint(plain):
        return False  # a number
    if kinds == {"dict"}:
        return dict in plain
    if kinds == {"list"} and ({list, tuple} <= set(plain) or {list, tuple}.isdisjoint(plain)):
        return list in plain
    return None


def _kinds_of(value: Value) -> tuple[type, ...]:
    """The plain types that isinstance() is asked about; () where another is among them."""
    names = [str(obj.data).removeprefix("builtins.") for each in (value, *(value.items or ())) for obj in each.refs]
    return tuple(_TYPES[name] for name in names) if all(name in _TYPES for name in names) else ()
