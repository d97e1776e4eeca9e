"""Methods of lists, dicts, models, optimizers, files and texts."""

from __future__ import annotations

import ast

from fairway.audit.flow.classes import _is_layer
from fairway.audit.flow.containers import cell_of, is_same
from fairway.audit.flow.files import Files
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.iteration import SECTION
from fairway.audit.flow.ordering import in_order
from fairway.audit.flow.values import (
    GRAD,
    MISSING,
    NO_OBJECTS,
    NONE,
    NOTHING,
    REFS,
    TEXT,
    WEIGHTS,
    Value,
    blend,
    hashable,
    join,
)
from fairway.audit.settings import UNKNOWN

_TEXT = frozenset(
    ("lower", "upper", "strip", "lstrip", "rstrip", "split", "startswith", "endswith", "replace", "join", "encode",
     "decode", "format", "title", "splitlines", "rsplit", "partition", "isdigit", "removeprefix", "removesuffix",
     "count", "find", "zfill", "ljust", "rjust", "hex")
)  # fmt: skip
_GROW = frozenset(("append", "appendleft", "add", "put", "put_nowait", "push", "insert"))
_KEEPS = frozenset(
    ("train", "eval", "to", "cuda", "cpu", "float", "half", "bfloat16", "requires_grad_", "double", "compile")
)

_SHRINK = frozenset(("pop", "popleft", "get_nowait", "popitem"))


class Methods(Files):
    """What is called on an object of the interpreter's own."""

    # Texts.
    def text_method(self, base: Value, name: str, args: list[Value]) -> Value | None:
        """A method of a constant text."""
        consts = [each.const for each in args]
        if base.refs:
            return None
        if name == "join" and args:
            return self._joined(base, args[0])
        if name == "replace" and base.words and len(args) == 2 and all(isinstance(each, str) for each in consts):
            old, new = str(consts[0]), str(consts[1])
            return base.but(words=tuple(word.replace(old, new) for word in base.words))
        if not isinstance(base.const, (str, bytes)) or name not in _TEXT:
            return None
        if name == "format":
            said = blend(base.but(words=(str(base.const),), const=MISSING), *map(self.flat, args))
            return said.but(flags=said.flags | TEXT)
        if MISSING in consts:
            return Value(words=(str(base.const)[:200],))
        try:
            return Value(const=getattr(base.const, name)(*consts), env=base.env)
        except Exception:
            return NOTHING

    def _joined(self, base: Value, listed: Value) -> Value:
        flat = self.flat(listed)
        plain = listed.items is not None or all(obj.kind == "list" for obj in listed.refs)
        parts = (self.elements(listed, None).exact or ()) if plain else ()
        words = tuple(
            word
            for each in parts
            for word in ((each.const[:200],) if isinstance(each.const, str) else self.flat(each).words)
        )
        return flat.but(const=MISSING, refs=NO_OBJECTS, items=None, flags=flat.flags | TEXT, words=words or flat.words)

    # Lists and dicts.
    def list_method(self, obj: Obj, base: Value, name: str, args: list[Value], node: ast.AST | None) -> Value:
        """obj.name(*args) of a list, set, deque or queue"""
        if name in _GROW:
            where = args[0].const if name == "insert" and len(args) == 2 else None
            if where is MISSING:
                self.loosen(obj)
            self.add(obj, args[-1] if args else NOTHING, node, where if isinstance(where, int) else None)
            if name == "add" and (keys := self.token_keys(args, node)):
                self.entered(obj, keys, NOTHING, node)
            return NONE
        if name in ("extend", "update", "extendleft"):
            for each in args:
                elements = self.elements(each, node)
                if elements.exact is not None:
                    for item in elements.exact:
                        self.add(obj, item, node)
                else:
                    self.loosen(obj)
                    elem = self.earlier_dropped(elements.any)
                    if node is not None and len(self.nest) > len(obj.born):  # for sweep in ...: order.extend(range(n))
                        elem = self.place_of_many(elem, node)
                    self.add_content(obj, self.repeats(elem, obj.born), "#elem")
            return NONE
        if name in _SHRINK or name == "get":
            return self.tagged(self.element_of(obj), (*base.spans, *self.since(obj.born)))
        if name == "clear":
            for key in list(obj.slots):
                self.heap.drop(obj, key)
            return NONE
        if name == "copy":
            return self._shallow(base)
        if name == "index" and args:
            return self._place_in(obj, args[0])
        if name in ("count", "qsize"):
            return NOTHING
        if name == "sort":
            self._sort(obj, node)
        if name in ("sort", "reverse", "remove", "discard"):
            self.loosen(obj)
            return NONE
        return self.flat(base)

    def _place_in(self, obj: Obj, value: Value) -> Value:
        """list.index of an object or a constant, where all elements are known; of the least of several losses the place
        hangs on that choice, as an argmin does."""
        exact = self.listed(obj)
        for n, each in enumerate(exact or ()):
            if is_same(each, value):
                return Value(const=n)
        return Value(choices=self.flat(value).choices)

    def _sort(self, obj: Obj, node: ast.AST | None) -> None:
        """Elements with losses in them now stand by these: which comes first is a choice."""
        elem = self.element_of(obj)
        if self.flat(elem).losses:
            mask = self.choose("sort", [elem], node)
            self.loosen(obj)
            self.heap.set(obj, "#elem", self._chosen_from(elem, mask))
            return
        keys = getattr(node, "keywords", [])
        key = next((self.evaluate(each.value) for each in keys if each.arg == "key"), None)
        if key is not None and self.sorts_by_length(key, elem, node):
            self.loosen(obj)
            self.heap.set(obj, "#elem", in_order(elem))

    def dict_method(
        self, obj: Obj, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        """obj.name(*args) of a dict"""
        key = args[0] if args else NOTHING
        if name in ("get", "pop", "setdefault"):
            return self._dict_get(obj, base, name, key, args, node)
        if name in ("items", "keys", "values"):
            return self._dict_view(obj, base, name, node)
        if name == "update":
            for each in args:
                self._update(obj, each, node)
            for word, value in kwargs.items():
                self.heap.set(obj, ("k", word), value)
                self.reflected(obj, word, value)
            return NONE
        if name == "clear":
            for each in list(obj.slots):
                self.heap.drop(obj, each)
            return NONE
        if name == "copy":
            return self._shallow(base)
        if name == "popitem":
            return self.tagged(self.element_of(obj), self.since(obj.born))
        return self.flat(base)

    def _dict_get(self, obj: Obj, base: Value, name: str, key: Value, args: list[Value], node: ast.AST | None) -> Value:
        known = key.const is not MISSING and ("k", key.const) in obj.slots if hashable(key.const) else False
        default = args[1] if len(args) > 1 else NONE
        cell = cell_of(key)
        if name != "pop" and cell and cell not in obj.slots and any(str(each).startswith("#of ") for each in obj.slots):
            if name == "setdefault":
                self._put_container(obj, [key], base, default, node)
            return default
        empty = not any(isinstance(each, tuple) or each in ("#elem", "#items") for each in obj.slots)
        found = self._looked_up(obj, [key], base.spans, node) if known or not empty else NOTHING
        if name == "setdefault" and not known:
            self._put_container(obj, [], base, default, node)
            return join(default, found) if not empty else default
        if name == "pop" and key.const is MISSING:
            found = self.tagged(found, self.since(obj.born))
        if known:
            if name == "pop" and len(base.refs) == 1:
                self.heap.drop(obj, ("k", key.const))
            return found
        learned = bool(obj.slots.get("#learned"))
        if empty and not learned:
            return default
        both = join(found, default)
        return both if not found.refs else both.but(const=MISSING)

    def _dict_view(self, obj: Obj, base: Value, name: str, node: ast.AST | None) -> Value:
        consts = [each for each in obj.slots if isinstance(each, tuple)]
        settings = all(isinstance(obj.slots[each].const, (bool, int, float, str)) for each in consts)
        settings = settings and (not self.nest or len(consts) <= SECTION)
        least = 0 if "#known" in obj.slots else 1
        exact = "#elem" not in obj.slots and least <= len(consts) <= (200 if settings else 24)  # a table of defaults
        pairs = [(Value(const=key[1]), obj.slots[key]) for key in consts]
        more = obj.slots.get("#keys", NOTHING)
        view = self.new("list", None, node)
        if not exact:
            elem = self.tagged(self.element_of(obj), base.spans)
            if obj.slots.get("#learned"):
                state = Value(states=frozenset((obj,)), knows=self.knows(obj))
                elem = blend(self.flat(elem).but(toks=frozenset(), const=MISSING), state).but(refs=elem.refs)
            pairs = [(more if isinstance(more, Value) else NOTHING, elem)]
        if name == "keys":
            values = [key for key, _ in pairs]
        elif name == "values":
            values = [value for _, value in pairs]
        else:
            values = [Value(items=(key, value)) for key, value in pairs]
        if exact:
            view.slots["#items"] = Value(items=tuple(values))
        elif values:
            view.slots["#elem"] = values[0]
        return self.ref(view, spans=base.spans)

    def _update(self, obj: Obj, other: Value, node: ast.AST | None) -> None:
        for each in other.refs:
            if each.kind == "dict":
                for key, value in list(each.slots.items()):
                    if isinstance(key, tuple):
                        self.heap.set(obj, key, value)
                        self.reflected(obj, key[1], value)
                    elif isinstance(value, Value):
                        self.add_content(obj, value, key)
            elif each.kind == "list" and (pairs := _named_pairs(self.listed(each))):
                for name, held in pairs:
                    self.heap.set(obj, ("k", name), held)
            elif each.kind in ("list", "generator"):
                elem = self.element_of(each)
                self.add_content(obj, elem.items[1] if elem.items and len(elem.items) == 2 else elem, "#elem")
            elif each.kind == "foreign" and each.data == "os.environ":
                obj.slots["#known"] = True  # that there may be none
                for name, said in self.settings.environment.items():
                    self.heap.set(obj, ("k", name), Value() if said is UNKNOWN else Value(const=said))
        flat = self.flat(other)
        if flat.raw and not obj.slots.get("#learned"):
            self.learn(obj, flat.toks, "table", node)

    # Models.
    def _hooked(self, obj: Obj, key: str, hook: Value, node: ast.AST | None) -> Value:
        """What takes a hook off its module again: its handle. Those of one line, in one call of its function, are one:
        they are kept in a list and taken off together."""
        self.add_content(obj, hook, key)
        mine = (id(node), self.frame.obj.number)
        handle = self.handles.get(mine)
        if handle is None:
            handle = self.handles[mine] = self.new("thing", "hook", node)
            handle.slots.update({"#key": Value(const=key), "#hook": NOTHING})
        self.hooked.setdefault(handle, {})[obj] = None
        self.heap.set(handle, "#hook", Value(refs=handle.slots["#hook"].refs | hook.refs))
        return self.ref(handle)

    def _unhooked(self, handle: Obj) -> Value:
        """Off all modules that it ever was on: where it is on none, nothing is taken."""
        key = handle.slots["#key"].const
        for module in self.hooked[handle]:
            hooks = module.slots.get(key, NOTHING)
            self.heap.set(module, key, hooks.but(refs=hooks.refs - handle.slots.get("#hook", NOTHING).refs))
        return NONE

    def module_method(
        self, obj: Obj, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value | None:
        """What nn.Module itself can do; None for another method."""
        this = self.ref(obj)
        weights = this.but(flags=WEIGHTS)
        if name in ("parameters", "buffers", "named_parameters", "named_buffers"):
            named = name.startswith("named")
            return self._list_of(Value(items=(NOTHING, weights)) if named else weights, node)
        if name in ("modules", "children", "named_modules", "named_children"):
            parts = [obj, *(part for part in self.parts_of(obj) if "#module" in part.slots)]
            inner = [part for part in self.parts_of(obj, listed=True) if "#module" in part.slots and part not in parts]
            return self._modules(parts, inner, name.startswith("named"), node)
        if name == "state_dict":
            state = self.new("dict", "state_dict", node)
            state.slots.update({"#elem": weights.but(choices=self._chosen_within(obj)), "#keys": NOTHING})
            return self.ref(state)
        if name == "load_state_dict":
            self.load(this, args[0] if args else kwargs.get("state_dict", NOTHING), node)
            return NOTHING
        if name == "zero_grad":
            self.forget_gradient(this)
            return NONE
        if name in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
            if not args or name == "register_full_backward_hook":
                return NOTHING
            return self._hooked(obj, "#hooks" if name == "register_forward_hook" else "#prehooks", args[0], node)
        if name in ("register_buffer", "register_parameter", "add_module", "register_module") and args:
            if isinstance(args[0].const, str):
                self.put(this, args[0].const, args[1] if len(args) > 1 else kwargs.get("tensor", NOTHING), node)
            return NONE
        if name in _KEEPS:
            return this
        if name == "apply" and args:
            self.call(args[0], [Value(refs=frozenset([obj, *self.parts_of(obj)][:12]))], {}, node)
            return this
        if name in ("get_submodule", "get_parameter"):
            return Value(refs=frozenset([obj, *self.parts_of(obj)][:12]))
        if name in ("append", "extend", "insert", "update") and args:
            self.adopt(obj, args[-1])
            self.add_content(obj, args[-1])
            return NONE
        if name in ("items", "values", "keys"):
            held = self.content_elem(obj)
            return self._list_of(Value(items=(NOTHING, held)) if name == "items" else held, node)
        return None

    def _modules(self, parts: list[Obj], inner: list[Obj], named: bool, node: ast.AST | None) -> Value:
        """modules(), named_modules(): few one by one, so that "each of this class is put back" is seen; many as one,
        which may be any of their classes. inner: those in lists of modules."""
        few = len(parts) <= REFS
        values = [self.ref(part) for part in parts] if few else []
        rest = frozenset(inner if few else [*parts, *inner])
        values += [Value(refs=rest)] if rest else []
        told = tuple(Value(items=(NOTHING, value)) if named else value for value in values)
        if not few:
            return self._list_of(told[0], node)
        listed = self.new("list", None, node)
        listed.slots["#items"] = Value(items=told)
        return self.ref(listed)

    def _chosen_within(self, obj: Obj) -> int:
        """The Choices that hang on what lies in a model and is no weight of it: a temperature in a tensor."""
        mask = 0
        for part in [obj, *self.parts_of(obj)]:
            for held in part.slots.values():
                for cell in held.refs if isinstance(held, Value) else ():
                    if cell.kind == "tensor" and cell.owner is None:
                        mask |= self.content(cell).choices
        return mask

    def content_elem(self, obj: Obj) -> Value:
        """An element of a ModuleList, ModuleDict or Sequential."""
        found = NOTHING
        content = obj.slots.get("#content", NOTHING)
        for part in content.refs:
            inner = self.element_of(part) if part.kind in ("list", "dict", "generator") else self.ref(part)
            found = join(found, inner)
        for item in content.items or ():
            found = join(found, item)
        return found

    # Things of other libraries.
    def thing(
        self, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None, files: Value | None = None
    ) -> Value:
        """An instance of a foreign class."""
        obj = self.new("thing", name, node)
        given = [*args, *kwargs.values()]
        if _is_layer(name):
            obj.slots["#module"] = 1
            for each in given:
                self.adopt(obj, each)
            refs = [each for each in given if each.refs or each.items]
            if len(refs) == 1:
                obj.slots["#content"] = (
                    refs[0] if name.rsplit(".", 1)[-1] != "Sequential" else Value(items=tuple(given))
                )
            elif refs:
                obj.slots["#content"] = Value(items=tuple(given))
            return self.ref(obj)
        if "optim" in name.lower() or name.rsplit(".", 1)[-1] in ("Muon", "AdamW", "SGD", "Adam", "LBFGS", "Lion"):
            obj.slots["#targets"] = kwargs.get("params", args[0] if args else NOTHING)
            obj.slots["#rate"] = kwargs.get("lr", NOTHING)
        if given:
            obj.slots["#content"] = blend(*(self.flat(each) for each in given)).but(
                refs=frozenset(ref for each in given for ref in each.refs if ref.kind in ("list", "dict", "tensor"))
            )
        return self.ref(obj)

    def thing_method(
        self, obj: Obj, base: Value, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value:
        """obj.name(*args) of a foreign instance"""
        this = self.ref(obj)
        if "#module" in obj.slots:
            found = self.module_method(obj, name, args, kwargs, node)
            if found is not None:
                return found
        if "#targets" in obj.slots:
            found = self.optimizer_method(obj, name, args, kwargs, node)
            if found is not None:
                return found
        if name == "step" and args:  # GradScaler.step(optimizer)
            self.step(args[0], node)
            return NOTHING
        if name == "scale" and args:
            return args[0]
        if name in ("enter_context", "enter_async_context") and args and isinstance(node, ast.expr):
            return self.enter(args[0], node)
        if name == "replay" and "#captured" in obj.slots:
            return self.replayed(obj)
        if name in ("submit", "apply_async", "map", "starmap", "imap", "apply") and args:
            return self.mapped(name, args, node)
        if name in ("start", "run", "join") and "#target" in obj.slots:
            if name != "join":
                self.call(obj.slots["#target"], list(obj.slots.get("#args", NOTHING).items or ()), {}, node)
            return NOTHING
        if name == "sample" and self.content(obj).states:  # Categorical(logits=...).sample()
            return self.operation("sample", [self.content(obj)], {}, node) or NOTHING
        if name == "add" and len(args) == 2 and isinstance(args[0].const, str) and isinstance(args[1].const, int):
            return self.claimed()  # store.add("next", 1)
        if obj.data == "hook" and name == "remove":
            return self._unhooked(obj)
        if name in ("result", "get", "__enter__") and not args:
            content = obj.slots.get("#content", NOTHING)
            return this if name == "__enter__" else self.tagged(content, self.since(obj.born))
        if "#path" in obj.slots:
            found = self.file_method(obj, name, args, node)
            if found is not None:
                return found
        if name == "update" and args and self.flat(args[0]).flags & GRAD:  # optax: (steps, memory)
            return Value(items=(args[0], args[1] if len(args) > 1 else NOTHING))
        if name in _GROW or name in ("write", "update", "extend", "feed", "send", "fill"):
            for each in args:
                self.add_content(obj, each)
            return NONE
        flats = [self.flat(each) for each in (*args, *kwargs.values())]
        if any(flat.toks or flat.losses or flat.states for flat in flats):
            self.add_content(obj, blend(*flats))
        content = self.flat(obj.slots.get("#content", NOTHING))
        result = blend(content, *flats)
        known = self.operation(name, [content, *args], kwargs, node) if content.toks or content.losses else None
        if known is not None:
            return known
        return self.tagged(result, self.since(obj.born)) if not result.losses else result

    def mapped(self, name: str, args: list[Value], node: ast.AST | None) -> Value:
        """executor.submit(f, *args), pool.map(f, items)"""
        future = self.new("thing", "future", node)
        if name in ("submit", "apply_async", "apply"):
            given = list(args[1].items) if len(args) == 2 and args[1].items and name != "submit" else args[1:]
            result = self.call(args[0], given, {}, node)
        else:
            result = self.call(args[0], [self.elements(each, node).any for each in args[1:]], {}, node)
            return self._list_of(result, node)
        future.slots["#content"] = result
        return self.ref(future)

    def optimizer_method(
        self, obj: Obj, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None
    ) -> Value | None:
        """What every optimizer can do; None for another method."""
        if name == "step":
            closure = args[0] if args else kwargs.get("closure", NOTHING)
            if any(each.kind in ("function", "bound", "partial") for each in closure.refs):
                self.call(closure, [], {}, node)
            self.step(self.ref(obj), node)
            return NOTHING
        if name == "zero_grad":
            self.forget_gradient(self.ref(obj))
            return NONE
        if name == "add_param_group" and args:
            self.heap.set(obj, "#targets", join(obj.slots["#targets"], args[0]))
            return NONE
        if name in ("state_dict", "load_state_dict", "train", "eval"):
            return NOTHING
        return None


def _named_pairs(exact: tuple[Value, ...] | None) -> list[tuple[str, Value]]:
    """[("nats", 1.5), ("tokens", 512)]: the names with what they are given; [] where any element is something else."""
    found: list[tuple[str, Value]] = []
    for each in exact or ():
        pair = each.items if each.items is not None and len(each.items) == 2 else (NOTHING, NOTHING)
        if not isinstance(pair[0].const, str):
            return []
        found.append((pair[0].const, pair[1]))
    return found
