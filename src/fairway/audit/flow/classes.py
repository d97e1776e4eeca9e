"""Classes, their instances, and attributes."""

from __future__ import annotations

import ast
from typing import Any

from fairway.audit.flow.heap import Obj
from fairway.audit.flow.learning import Learning
from fairway.audit.flow.values import GRAD, LENGTH, MISSING, NONE, NOTHING, ONE_ROW, WEIGHTS, Value, blend, join

_SAME = frozenset(("data", "module", "_orig_mod", "T", "mT", "mH", "H", "real", "flat", "values", "_forward_module"))
_PLAIN = frozenset(("dtype", "device", "layout", "is_cuda", "itemsize", "__name__", "__class__", "requires_grad"))
_SIZES = frozenset(("shape", "ndim", "size", "nbytes"))
_CONTAINERS = frozenset("dict OrderedDict defaultdict UserDict Counter list UserList deque set".split())  # noqa: SIM905


class Classes(Learning):
    """Look-up along classes; instances and what they hold."""

    # Classes.
    def line_of(self, cls: Obj, deep: int = 12) -> list[Obj]:
        """A class and what it derives from, nearest first; foreign bases are among them."""
        found = [cls]
        if deep and cls.kind == "class":
            for base in cls.slots.get("#bases", NOTHING).items or ():
                for obj in base.refs:
                    found += [each for each in self.line_of(obj, deep - 1) if each not in found]
        return found

    def is_module(self, cls: Obj) -> bool:
        """Whether instances hold parameters: it derives from nn.Module or one of torch's layers."""
        return any(each.kind == "foreign" and _is_layer(each.data) for each in self.line_of(cls))

    def is_optimizer(self, cls: Obj) -> bool:
        return any(each.kind == "foreign" and "optim" in each.data.lower() for each in self.line_of(cls))

    def find(self, cls: Obj, name: str, after: Obj | None = None) -> tuple[Value, Obj] | None:
        """A class attribute and the class that has it; after: only bases of that class."""
        line = self.line_of(cls)
        if after in line:
            line = line[line.index(after) + 1 :]
        for each in line:
            if each.kind == "class" and name in each.slots:
                return each.slots[name], each
        return None

    def container(self, cls: Obj) -> str:
        """The name of the container that a class derives from, `class Registry(dict)`, or ""."""
        line = self.line_of(cls)
        return next((each.data for each in line if each.kind == "foreign" and _last(each.data) in _CONTAINERS), "")

    def fill(self, obj: Obj, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> None:
        """What lies in an object that is a container itself lies in a container of its own."""
        made = self.call(self.outside(name), args, kwargs, node)
        self.heap.set(obj, "#held", made)

    def make(self, cls: Obj, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """cls(*args, **kwargs)"""
        obj = self.new("instance", cls, node)
        if self.is_module(cls):
            obj.slots["#module"] = 1
        this = self.ref(obj)
        found = self.find(cls, "__init__")
        container = self.container(cls)
        if container:
            self.fill(obj, container, args if found is None else [], kwargs if found is None else {}, node)
        if self.is_optimizer(cls):
            obj.slots["#targets"] = kwargs.get("params", args[0] if args else NOTHING)
            obj.slots["#rate"] = kwargs.get("lr", NOTHING)
        if found is not None:
            self.call(found[0], [this, *args], kwargs, node)
        else:
            self._fields(cls, obj, args, kwargs)
            post = self.find(cls, "__post_init__")
            if post is not None:
                self.call(post[0], [this], {}, node)
        return this

    def _fields(self, cls: Obj, obj: Obj, args: list[Value], kwargs: dict[str, Value]) -> None:
        """What a dataclass, a NamedTuple or a foreign base makes of its arguments."""
        names = [name for each in reversed(self.line_of(cls)) for name in each.slots.get("#fields", ())]
        names = list(dict.fromkeys(names))
        for name, value in zip(names, args, strict=False):
            obj.slots[name] = value
        others = kwargs.get("**", NOTHING)
        obj.slots.update({name: value for name, value in kwargs.items() if name != "**"})
        for name in names:
            if name not in obj.slots:
                default = self.find(cls, name)
                held = self._default(default[0]) if default else others
                obj.slots[name] = held if others is NOTHING else join(held, others)
        rest = [*args[len(names) :]]
        if rest:
            self.add_content(obj, blend(*(self.flat(each) for each in rest)))

    def _default(self, value: Value) -> Value:
        """A field's default; what field(default_factory=...) makes is made anew for each instance."""
        for obj in value.refs:
            if obj.kind == "thing" and "#factory" in obj.slots:
                return self.call(obj.slots["#factory"], [], {}, None)
        return value

    def row_of(self, value: Value) -> tuple[Value, ...] | None:
        """The fields of a named tuple, in order; of one of several, what each field may be; None for all else."""
        found: tuple[Value, ...] | None = None
        for obj in value.refs:
            names = self.named_fields(obj.data) if obj.kind == "instance" else ()
            row = tuple(obj.slots.get(name, NOTHING) for name in names)
            if not row or (found is not None and len(found) != len(row)):
                return None
            found = row if found is None else tuple(join(a, b) for a, b in zip(found, row, strict=True))
        return found

    def named_fields(self, cls: Obj) -> tuple[str, ...]:
        """The fields of a named tuple's class, in order; () for all other classes."""
        line = self.line_of(cls)
        named = any(each.kind == "foreign" and each.data.endswith("NamedTuple") for each in line)
        if not named and not any(getattr(each.data, "name", "") == "namedtuple" for each in line):
            return ()
        return tuple(dict.fromkeys(name for each in reversed(line) for name in each.slots.get("#fields", ())))

    def bound(self, function: Value, this: Value, cls: Obj) -> Value:
        """A class attribute as seen through an instance."""
        out = [each for each in function.refs if each.kind != "function"]
        parts = [Value(refs=frozenset(out))] if out or not function.refs else []
        for each in function.refs:
            if each.kind != "function":
                continue
            kinds = each.slots.get("#kind", "")
            if kinds == "static":
                parts.append(self.ref(each))
            elif kinds == "property":
                parts.append(self.call(self.ref(each), [this], {}, None))
            else:
                receiver = self.ref(cls) if kinds == "class" else this
                method = self.new("bound", (each, receiver))
                parts.append(self.ref(method))
        if not function.refs:
            return function
        result = parts[0]
        for part in parts[1:]:
            result = join(result, part)
        return result

    # Attributes.
    def get(self, base: Value, name: str, node: ast.AST | None) -> Value:
        """base.name"""
        if name in _PLAIN and not self._has(base, name):
            return NOTHING
        if name in _SIZES and not self._has(base, name):
            return Value(flags=LENGTH | (self.flat(base, 1).flags & ONE_ROW), sym=f"{name}")
        found: list[Value] = []
        for obj in sorted(base.refs, key=lambda each: each.number)[:6]:
            found.append(self._get(obj, base, name, node))
        if not found:
            return self._of_tensor(base, name)
        result = found[0]
        for each in found[1:]:
            result = join(result, each)
        if base.spans and not any("#module" in obj.slots for obj in base.refs):
            result = self.tagged(result, base.spans)
        return self._chosen_from(result, base.choices) if base.choices else result

    def _chosen_from(self, elem: Value, choices: int) -> Value:
        """The element as one that was chosen by losses."""
        items = tuple(self._chosen_from(item, choices) for item in elem.items) if elem.items is not None else None
        return elem.but(items=items, choices=elem.choices | choices)

    def _has(self, base: Value, name: str) -> bool:
        for obj in base.refs:
            if obj.kind in ("instance", "module", "class") and (
                name in obj.slots
                or (obj.kind == "instance" and self.find(obj.data, name))
                or (obj.kind == "class" and self.find(obj, name))
            ):
                return True
        return False

    def _of_tensor(self, base: Value, name: str) -> Value:
        if name == "grad":
            return NOTHING
        if base.const is not MISSING:
            return self.ref(self.new("method", (base, name)))
        return base

    def _get(self, obj: Obj, base: Value, name: str, node: ast.AST | None) -> Value:
        kind, this = obj.kind, self.ref(obj)
        if kind in ("instance", "thing", "tensor") and name == "grad" and name not in obj.slots:
            grad = obj.root.slots.get("#grad", NOTHING)
            return grad if isinstance(grad, Value) else NOTHING
        if kind == "foreign":
            put = obj.slots.get(name)  # F.linear = spying
            return put if isinstance(put, Value) else self.outside(f"{obj.data}.{name}")
        if kind == "module":
            found = obj.slots.get(name)
            return found if found is not None else NOTHING
        if kind == "instance":
            return self._of_instance(obj, this, name, node)
        if kind == "class":
            return self._of_class(obj, this, name)
        if kind == "super":
            return self._of_super(obj, name)
        if name in _SAME and kind in ("tensor", "thing"):
            return this
        if kind == "thing":
            return self._of_thing(obj, this, name)
        if kind == "function" and name in obj.slots:
            held = obj.slots[name]
            return held if isinstance(held, Value) else NOTHING
        return self.ref(self.new("method", (Value(refs=frozenset((obj,)), spans=base.spans), name)))

    def _of_instance(self, obj: Obj, this: Value, name: str, node: ast.AST | None) -> Value:
        if name in obj.slots:
            held = obj.slots[name]
            return held if isinstance(held, Value) else NOTHING
        found = self.find(obj.data, name)
        if found is not None:
            return self.bound(found[0], this, obj.data)
        hook = self.find(obj.data, "__getattr__")
        if hook is not None and not name.startswith("__"):
            return self.call(hook[0], [this, Value(const=name)], {}, node)
        if name == "__dict__":
            return self._as_table(obj, node)
        if name == "param_groups" and "#targets" in obj.slots:
            return self._groups(obj, node)
        if "#module" in obj.slots and name in _SAME:
            return this
        if "#module" in obj.slots and name in _OF_MODULES:
            return this.but(flags=WEIGHTS) if name != "training" else Value()
        if any(each.kind == "foreign" for each in self.line_of(obj.data)[1:]):
            return self.ref(self.new("method", (this, name)))
        return self.flat(obj.slots.get("#content", NOTHING))

    def _as_table(self, obj: Obj, node: ast.AST | None) -> Value:
        """What an object holds, by name: obj.__dict__, vars(obj)."""
        view = self.new("dict", "vars", node)
        view.slots.update({("k", key): value for key, value in obj.slots.items() if isinstance(value, Value)})
        view.slots["#of"] = obj
        return self.ref(view)

    def reflected(self, view: Obj, key: Any, value: Value) -> None:
        """What is put into obj.__dict__ is an attribute of it."""
        owner = view.slots.get("#of")
        if owner is not None and isinstance(key, str):
            self.put(self.ref(owner), key, value, None)

    def _groups(self, obj: Obj, node: ast.AST | None) -> Value:
        group = obj.slots.get("#group")
        if group is None:
            group = self.new("dict", "group", node)
            self.heap.set(obj, "#group", group)
        group.slots[("k", "params")] = obj.slots["#targets"]
        groups = self.new("list", None, node)
        groups.slots["#elem"] = self.ref(group)
        return self.ref(groups)

    def _of_class(self, obj: Obj, this: Value, name: str) -> Value:
        found = self.find(obj, name)
        if found is None:
            if name == "__name__":
                return Value(const=getattr(obj.data, "name", ""))
            return self.ref(self.new("method", (this, name)))
        value, _ = found
        for each in value.refs:
            if each.kind == "function" and each.slots.get("#kind") == "class":
                return self.ref(self.new("bound", (each, this)))
        return value

    def _of_super(self, obj: Obj, name: str) -> Value:
        owner, this = obj.data
        for each in this.refs:
            cls = each.data if each.kind == "instance" else each
            if not isinstance(cls, Obj):
                continue
            found = self.find(cls, name, after=owner)
            if found is not None:
                return self.bound(found[0], this, cls)
        return self.ref(self.new("method", (this, f"super.{name}")))

    def _of_thing(self, obj: Obj, this: Value, name: str) -> Value:
        if name in obj.slots:
            held = obj.slots[name]
            return held if isinstance(held, Value) else NOTHING
        if name == "param_groups" and "#targets" in obj.slots:
            return self._groups(obj, None)
        if "#module" in obj.slots and name in _OF_MODULES:
            return this.but(flags=WEIGHTS) if name != "training" else Value()
        if "#path" in obj.slots and name in ("parent", "name", "stem", "suffix"):
            piece = self.piece_of_path(this, name)
            return self.path([piece], None) if name == "parent" else piece
        if "#path" in obj.slots and name == "parts" and (pieces := self.pieces_of_path(this)) is not None:
            return pieces
        if name == "__dict__" and obj.data == "namespace":  # what argparse read, SimpleNamespace(...)
            return self._as_table(obj, None)
        return self.ref(self.new("method", (this, name)))

    def put(self, base: Value, name: str, value: Value, node: ast.AST | None) -> None:
        """base.name = value"""
        if (self.chosen and not self.plain(value)) or self.chosen:
            value = value.but(choices=value.choices | self.chosen)
        refs = sorted(base.refs, key=lambda each: each.number)
        for obj in refs:
            if name == "grad" and obj.kind in ("instance", "thing", "tensor"):
                grad = self.flat(value)
                kept = grad.but(flags=grad.flags | GRAD, const=MISSING) if grad.toks else NOTHING
                self.heap.set(obj.root, "#grad", kept)
            elif name == "data" and (obj.kind == "tensor" or "#module" in obj.slots):
                self.write(obj, value, node, strong=True)
            elif obj.kind in ("instance", "class", "module", "thing", "function", "foreign"):
                old = obj.slots.get(name)
                both = join(old, value) if len(refs) > 1 and isinstance(old, Value) else value
                self.heap.set(obj, name, both)
                if "#module" in obj.slots:
                    self.adopt(obj, value)

    def adopt(self, owner: Obj, value: Value, deep: int = 4) -> None:
        """Modules and parameters that become a part of a model."""
        for part in value.refs:
            if part is owner or part.owner is not None or owner.root is part:
                continue
            if "#module" in part.slots or "#leaf" in part.slots:
                part.owner = owner
            elif part.kind in ("list", "dict") and deep:
                for held in self.held(part):
                    self.adopt(owner, held, deep - 1)
        for item in value.items or ():
            if deep:
                self.adopt(owner, item, deep - 1)

    def copied(self, value: Value, seen: dict[Obj, Obj] | None = None, deep: int = 12) -> Value:
        """copy.deepcopy: new objects that know what the old ones knew."""
        seen = {} if seen is None else seen
        items = tuple(self.copied(item, seen, deep) for item in value.items) if value.items is not None else None
        refs = frozenset(self._copy(obj, seen, deep) for obj in value.refs)
        return value.but(refs=refs, items=items)

    def _copy(self, obj: Obj, seen: dict[Obj, Obj], deep: int) -> Obj:
        if obj in seen:
            return seen[obj]
        if obj.kind not in ("instance", "thing", "tensor", "list", "dict") or not deep:
            return obj
        new = seen[obj] = self.new(obj.kind, obj.data)
        slots: dict[Any, Any] = {}
        for key, held in list(obj.slots.items()):
            slots[key] = self.copied(held, seen, deep - 1) if isinstance(held, Value) else held
        new.slots.update(slots)
        inherited = self.knows(obj) if self.learner(obj) else 0
        if inherited:
            new.slots["#learned"] = inherited
        if obj.kind == "dict" and obj.data == "state_dict":  # live views of the weights become copies
            for key, held in list(new.slots.items()):
                if isinstance(held, Value):
                    new.slots[key] = self.snapshot(obj.slots[key])
            new.data = None
        if obj.owner is not None and obj.owner in seen:
            new.owner = seen[obj.owner]
        return new

    def snapshot(self, value: Value) -> Value:
        """The content of weights as it is now, in a tensor of its own."""
        held = self.flat(value)
        cell = self.new("tensor")
        cell.slots["#content"] = held.but(const=MISSING)
        return self.ref(cell)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


_OF_MODULES = ("weight", "bias", "training")  # which of two modes a module is in nobody follows


def _is_layer(name: str) -> bool:
    """torch.nn.Module, torch.nn.Linear, transformers.GPT2Model..."""
    parts = name.split(".")
    last = parts[-1]
    if last in ("Parameter", "Buffer", "functional", "CrossEntropyLoss", "NLLLoss") or "functional" in parts:
        return False
    return ("nn" in parts and last[:1].isupper()) or last in ("Module", "PreTrainedModel", "LightningModule")


__all__ = ["NONE", "Classes", "_is_layer"]
