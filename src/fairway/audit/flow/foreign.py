"""Functions that are not in the script: builtins, the standard library, torch."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from typing import Any

from fairway.audit.flow import events
from fairway.audit.flow.core import Frame
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.methods import Methods, data_kind
from fairway.audit.flow.tokens import Tok
from fairway.audit.flow.values import (
    CLOCK,
    LENGTH,
    MISSING,
    NO_OBJECTS,
    NONE,
    NOTHING,
    RAW,
    Value,
    blend,
    join,
)
from fairway.audit.settings import UNKNOWN

PASSES = frozenset(
    ("compile", "script", "jit", "remat", "DistributedDataParallel", "DDP", "DataParallel", "FSDP",
     "FullyShardedDataParallel", "njit", "wraps", "lru_cache", "cache", "no_grad", "inference_mode", "autocast",
     "contextmanager", "fully_shard",
     "prepare", "disable", "unwrap_model", "tqdm", "assume_constant_result", "allow_in_graph", "dynamo_disable",
     "Variable", "convert_sync_batchnorm", "checkpoint_wrapper", "optimize", "AveragedModel", "pmap", "custom_fwd",
     "custom_bwd", "once_differentiable", "total_ordering", "cached_property")
)  # fmt: skip
SAYS = frozenset(("print", "info", "warning", "debug", "error", "critical", "log_metrics", "pprint", "secho", "echo"))
NUMBERS: dict[str, Callable[..., Any]] = {
    "int": int, "float": float, "bool": bool, "str": str, "abs": abs, "round": round, "repr": repr,
    "ceil": math.ceil, "floor": math.floor, "sqrt": lambda x: x**0.5 if x >= 0 else MISSING, "ord": ord, "chr": chr,
}  # fmt: skip
RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "0"}
LOADS = frozenset(
    ("fromfile", "memmap", "load", "loadtxt", "load_dataset", "load_file", "safe_open", "from_file", "read_table",
     "read_parquet", "read_csv", "genfromtxt", "load_from_disk", "mmap", "loads_file")
)  # fmt: skip
UNPACKS = frozenset(("loads", "frombuffer", "decompress", "b85decode", "b64decode", "a85decode", "BytesIO", "StringIO"))


class Foreign(Methods):
    """foreign(name, args): what a function outside the script gives."""

    def run_text(self, args: list[Value], node: ast.AST | None) -> Value:
        raise NotImplementedError

    def outside_call(self, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """name(*args, **kwargs)"""
        last = name.rsplit(".", 1)[-1]
        handler = getattr(self, f"_do_{last}", None)
        if handler is not None:
            found = handler(name, args, kwargs, node)
            if found is not None:
                return found
        if last in PASSES:
            return self._passed(last, args, kwargs, node)
        if last in SAYS or (last == "log" and name.startswith(("wandb", "logging", "logger"))):
            return self._say(args, kwargs, node)
        if last in LOADS and args and not name.startswith(("json", "pickle", "yaml", "toml")):
            return self._load(last, args, node)
        if last in NUMBERS and len(args) >= 1:
            return self._number_of(last, args, node)
        found = self.operation(last, args, kwargs, node)
        if found is not None:
            return found
        if last[:1].isupper() and not name.startswith("builtins.") and last not in UNPACKS:
            return self.thing(name, args, kwargs, node)
        flats = [self.flat(each) for each in (*args, *kwargs.values())]
        result = blend(*flats) if flats else NOTHING
        if not result.toks and not result.states and not result.losses and not result.flags & LENGTH:
            result = result.but(const=MISSING, refs=NO_OBJECTS, items=None)
            if last in ("next", "read", "get", "recv", "popen", "check_output", "getrandbits", "random", "choice"):
                result = self.tagged(result, self.here())
        self._call_back(args, kwargs, node)
        return result

    def _call_back(self, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> None:
        """A function of the script that is handed to another library may be called there."""
        for each in (*args, *kwargs.values()):
            for obj in each.refs:
                if obj.kind in ("function", "bound", "partial") and not each.toks:
                    self.call(self.ref(obj), [], {}, node)

    def _passed(self, last: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """Wrappers that give back what they are given: compile, DDP, decorators."""
        given = args[0] if args else kwargs.get("module", kwargs.get("model", kwargs.get("iterable")))
        if last == "compile" and given is not None and (given.const is not MISSING or given.toks):
            return given  # compile(text, ...)
        if given is None or (given.const is not MISSING and not given.refs):
            return self.ref(self.new("wrapper", last, node))
        return given

    def _say(self, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        flats = [self.flat(each) for each in args]
        value = blend(*flats) if flats else NOTHING
        words = tuple(str(each.const)[:200] for each in flats if isinstance(each.const, str))
        if value.losses:
            self.said(value, Value(words=words), node, "printed")
        where = kwargs.get("file")
        if where is not None:
            for obj in where.refs:
                if "#path" in obj.slots:
                    self.write_to(obj.slots["#path"], value, node)
        return NONE

    def _do_getLogger(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return self.ref(self.new("thing", "logger", node))

    _do_get_logger = _do_getLogger

    def _number_of(self, last: str, args: list[Value], node: ast.AST | None) -> Value:
        value = args[0]
        if value.const is not MISSING and all(each.const is not MISSING for each in args):
            try:
                const = NUMBERS[last](*(each.const for each in args))
            except Exception:
                return NOTHING
            return Value(const=const, less=value.less, env=value.env, choices=value.choices)
        flat = self.flat(value)
        if last in ("str", "repr") and not flat.words and flat.const is not MISSING:
            return Value(words=(str(flat.const)[:200],))
        return flat.but(const=MISSING, items=None)

    # Settings.
    def setting(self, name: Value, default: Value) -> Value:
        """An environment variable: what the run command sets, else the default."""
        if not isinstance(name.const, str):
            return default.but(const=MISSING) if default.const is not MISSING else default
        env = frozenset((name.const,))
        if name.const in RANKS:
            return Value(const=RANKS[name.const])
        said = self.settings.environ(name.const, None)
        if said is UNKNOWN:
            return Value(env=env)
        if said is not None:
            return Value(const=said)
        return default if default is not NOTHING else Value(env=env)

    def _do_getenv(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self.setting(args[0], args[1] if len(args) > 1 else kwargs.get("default", NONE)) if args else None

    def _do_get(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if name == "os.environ.get" and args:
            return self.setting(args[0], args[1] if len(args) > 1 else kwargs.get("default", NONE))
        return None

    _do_setdefault = _do_get

    def _do_ArgumentParser(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return self.ref(self.new("thing", "argparse", node))

    def parser_method(
        self, obj: Obj, name: str, args: list[Value], kwargs: dict[str, Value], node: Any
    ) -> Value | None:
        """argparse: an option's value is what the run command gives, else its default."""
        if name == "add_argument" and args:
            texts = [each.const for each in args if isinstance(each.const, str)]
            long = next((text for text in texts if text.startswith("--")), texts[0] if texts else "")
            dest = kwargs.get("dest", NOTHING).const
            option = dest if isinstance(dest, str) else long.lstrip("-").replace("-", "_")
            action = kwargs.get("action", NOTHING).const
            default = kwargs.get("default", Value(const=action == "store_false") if action else NONE)
            said = self.settings.argument(long or option, None)
            env = frozenset((long,))
            if said is UNKNOWN:
                obj.slots[option] = Value(env=env)
            elif said is None:
                obj.slots[option] = default
            elif action in ("store_true", "store_false"):
                obj.slots[option] = Value(const=action == "store_true")
            else:
                kind = next(
                    (o.data.rsplit(".", 1)[-1] for o in kwargs.get("type", NOTHING).refs if o.kind == "foreign"), "str"
                )
                obj.slots[option] = self._number_of(kind if kind in NUMBERS else "str", [Value(const=said)], node)
            return NOTHING
        if name in ("parse_args", "parse_known_args"):
            space = self.new("thing", "namespace", node)
            space.slots.update({key: value for key, value in obj.slots.items() if isinstance(value, Value)})
            return self.ref(space) if name == "parse_args" else Value(items=(self.ref(space), NOTHING))
        if name in ("add_argument_group", "add_mutually_exclusive_group"):
            return self.ref(obj)
        return None

    def _do_SimpleNamespace(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        space = self.new("thing", "namespace", node)
        space.slots.update(kwargs)
        return self.ref(space)

    _do_Namespace = _do_SimpleNamespace

    # Files.
    def _do_open(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args:
            return None
        file = self.new("thing", "file", node)
        file.slots["#path"] = self.path_of(args[0])
        mode = (args[1] if len(args) > 1 else kwargs.get("mode", NOTHING)).const
        if isinstance(mode, str) and "a" in mode:
            file.slots["#grows"] = 1
        return self.ref(file)

    def _do_Path(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return self._path(args, node)

    _do_PurePath = _do_Path

    def _path(self, args: list[Value], node: Any) -> Value:
        path = self.new("thing", "path", node)
        consts = [each.const for each in map(self.path_of, args)]
        if args and all(isinstance(each, str) for each in consts):
            path.slots["#path"] = Value(
                const="/".join(str(each) for each in consts), env=blend(*map(self.flat, args)).env
            )
        else:
            paths = [self.path_of(each) for each in args]
            words = tuple(str(p.const) for p in paths if isinstance(p.const, str))
            path.slots["#path"] = blend(*paths, Value(words=words)) if paths else NOTHING
        return self.ref(path)

    def _do_join(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if "path" not in name:
            return None
        paths = [self.path_of(each) for each in args]
        if all(isinstance(each.const, str) for each in paths):
            return Value(const="/".join(str(each.const) for each in paths), env=blend(*map(self.flat, paths)).env)
        return blend(*(Value(words=(each.const,)) if isinstance(each.const, str) else each for each in paths))

    def _do_glob(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args:
            return None
        path = self.path_of(args[0])
        words = (path.const,) if isinstance(path.const, str) else path.words
        return self._list_of(Value(words=words, env=path.env), node)

    _do_iglob = _do_glob

    def _load(self, last: str, args: list[Value], node: ast.AST | None) -> Value:
        if last == "load_dataset":
            words = [str(each.const) for each in args if isinstance(each.const, str)]
            return self.read_from(Value(words=tuple(words)), node)
        return self.read_from(self.path_of(args[0]), node)

    def _do_load(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if name.startswith(("json", "pickle", "yaml", "toml", "marshal")) and args:
            return self.read_from(self.path_of(args[0]), node)
        if args and self._buffer(args[0]) is not None:
            return self._buffer(args[0])
        return None

    def _buffer(self, value: Value) -> Value | None:
        """What was put into a BytesIO."""
        for obj in value.refs:
            if obj.kind == "thing" and obj.data == "buffer":
                content = obj.slots.get("#content", NOTHING)
                return content if isinstance(content, Value) else None
        return None

    def _do_BytesIO(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        buffer = self.new("thing", "buffer", node)
        if args:
            buffer.slots["#content"] = args[0]
        return self.ref(buffer)

    _do_StringIO = _do_BytesIO

    def _do_save(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        value, where = (args[1], args[0]) if name.startswith(("np", "numpy")) else (args[0], args[1])
        kept = self._saved(value)
        for obj in where.refs:
            if obj.kind == "thing" and obj.data == "buffer":
                self.heap.set(obj, "#content", kept)
                return NONE
        self.write_to(self.path_of(where), kept, node)
        return NONE

    def _saved(self, value: Value) -> Value:
        """What goes into a file: a copy of the values as they are now, in the same dicts."""
        return self.copied(value)

    def _do_dump(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self._do_save("dump", args, kwargs, node)

    def _do_save_file(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self._do_save("save", args, kwargs, node)

    def _do_savez(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if args:
            given = [self.flat(each) for each in (*args[1:], *kwargs.values())]
            self.write_to(self.path_of(args[0]), blend(*given) if given else NOTHING, node)
        return NONE

    _do_savez_compressed = _do_savez

    def _do_write_bytes(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return None

    # Builtins.
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
        parts = [self.elements(each, node) for each in args]
        exact = [each.exact for each in parts]
        new = self.new("list", None, node)
        if parts and all(each is not None for each in exact):
            rows = zip(*(each or () for each in exact), strict=False)
            new.slots["#items"] = Value(items=tuple(Value(items=row) for row in rows))
        else:
            new.slots["#elem"] = Value(items=tuple(each.any for each in parts))
        return self.ref(new)

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
        new.slots["#elem"] = self.elements(args[0], node).any
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
                found.append(self.ref(made))
        listed = self.new("list", None, node)
        listed.slots["#items"] = Value(items=tuple(found))
        return self.ref(listed)

    def _do_replace(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if "dataclasses" not in name or not args:
            return None
        made = self._shallow_instance(args[0])
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
        if not args or not any(obj.kind in ("function", "bound") for obj in args[0].refs):
            return None
        elements = self.elements(args[1], node) if len(args) > 1 else None
        if elements is not None and elements.exact:
            state, *rest = [*args[2:3], *elements.exact]
            for each in rest:
                state = self.call(args[0], [state, each], {}, node)
            return state
        elem = elements.any if elements is not None else NOTHING
        state = args[2] if len(args) > 2 else elem
        loop = self.loop_id(node)
        self.turns[loop] = 2
        for turn in (1, 2):
            self.nest.append((loop, turn))
            state = self.call(args[0], [state, self.turned(elem, loop, turn)], {}, node)
            self.nest.pop()
        return state

    # Functional gradients.
    def _do_value_and_grad(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self.ref(self.new("gradient", (args[0], True), node)) if args else None

    def _do_grad(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        called = args and any(obj.kind in ("function", "bound", "partial") for obj in args[0].refs)
        return self.ref(self.new("gradient", (args[0], False), node)) if called else None

    def _do_grad_and_value(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self.ref(self.new("gradient", (args[0], "last"), node)) if args else None

    def _do_apply_updates(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """optax.apply_updates(weights, steps): new weights that have learned"""
        if len(args) < 2:
            return None
        steps = self.flat(args[1])
        if args[0].refs:
            made = self.copied(args[0])
        else:
            tree = self.new("dict", "weights", node)
            tree.slots["#elem"] = self.flat(args[0]).but(const=MISSING)
            made = self.ref(tree)
        for obj in made.refs:
            old = self.flat(args[0]).knows
            obj.slots["#fresh"] = min((o.slots.get("#fresh", o.born) for o in args[0].refs), key=len, default=())
            self.learn(obj, steps.toks, "gradient", node, steps.losses)
            self.heap.set(obj, "#learned", obj.slots.get("#learned", 0) | old)
        return made

    def _do_tree_map(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        result = self.call(args[0], [self.flat(each) for each in args[1:]], {}, node)
        return self.flat(result)

    def loop_id(self, node: ast.AST) -> int:
        raise NotImplementedError

    def turned(self, element: Value, loop: int, turn: int) -> Value:
        raise NotImplementedError

    def _do_partial(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self.ref(self.new("partial", (args[0], tuple(args[1:]), dict(kwargs)), node)) if args else None

    def _do_getattr(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        if isinstance(args[1].const, str):
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
            kinds = [obj for obj in args[1].refs if obj.kind == "class"]
            for obj in args[0].refs:
                if obj.kind == "instance" and len(args[0].refs) == 1 and len(kinds) == 1 and not args[1].items:
                    return Value(const=kinds[0] in self.line_of(obj.data))
        return NOTHING

    def _do_type(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        classes = frozenset(obj.data for obj in args[0].refs if obj.kind == "instance") if args else frozenset()
        return Value(refs=classes) if classes and len(args) == 1 else None

    def _do_exec(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self.run_text(args, node) if name in ("builtins.exec", "builtins.eval", "exec", "eval") else None

    _do_eval = _do_exec

    def _do_any(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if name.startswith("builtins") and args:
            return self.flat(args[0]).but(const=MISSING)
        return None

    _do_all = _do_any

    # Running functions elsewhere.
    def _do_Thread(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        thing = self.new("thing", name, node)
        target = kwargs.get("target", args[1] if len(args) > 1 else NOTHING)
        given = kwargs.get("args", NOTHING)
        thing.slots["#target"] = target
        thing.slots["#args"] = given
        return self.ref(thing)

    _do_Process = _do_Thread

    def _do_spawn(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args:
            return None
        given = kwargs.get("args", args[1] if len(args) > 1 else NOTHING)
        self.call(args[0], [Value(const=0), *(given.items or ())], {}, node)
        return NONE

    def _do_checkpoint(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        called = args and any(obj.kind in ("function", "bound", "instance", "partial") for obj in args[0].refs)
        return self.call(args[0], args[1:], {}, node) if called else None

    def _do_vmap(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return args[0] if args else None

    def _do_backward(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        for each in args[:1]:
            for part in self.elements(each, node).exact or (each,):
                self.backward(part, node)
        return NONE

    # Ranks.
    def _do_all_gather_object(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        for obj in args[0].refs:
            if obj.kind == "list":
                self.loosen(obj)
                self.heap.set(obj, "#elem", args[1])
            elif obj.kind == "tensor":
                self.write(obj, args[1], node)
        return NONE

    _do_all_gather = _do_all_gather_into_tensor = _do_all_gather_object

    def _do_all_reduce(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return NONE

    _do_broadcast = _do_barrier = _do_broadcast_object_list = _do_all_reduce

    def _do_synchronize(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return NONE

    def _do_Parameter(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        content = args[0] if args else kwargs.get("data", NOTHING)
        tensors = [obj for obj in content.refs if obj.kind == "tensor"]
        grows = kwargs.get("requires_grad")
        if not tensors:
            cell = self.new("tensor", None, node)
            flat = self.flat(content)
            cell.slots["#content"] = Value(choices=flat.choices)
            if flat.knows:
                cell.slots["#learned"] = flat.knows
            tensors = [cell]
        for obj in tensors:
            if grows is None or grows.const is not False:
                self.heap.set(obj, "#leaf", 1)
        return Value(refs=frozenset(tensors), flags=content.flags)

    _do_Buffer = _do_Parameter

    def _do_at(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """np.add.at(table, keys, value)"""
        if len(args) < 2:
            return None
        keys = list(args[1].items) if args[1].items is not None else [args[1]]
        for obj in args[0].refs:
            tokens = self.token_keys(keys)
            if tokens and obj.kind == "tensor":
                self.entered(obj, tokens, NOTHING, node)
            elif obj.kind == "tensor":
                self.write(obj, args[-1], node)
        return NONE

    def _do_Event(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return Value(flags=CLOCK) if "cuda" in name else self.ref(self.new("thing", name, node))

    def _do_SentencePieceProcessor(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return self.ref(self.new("thing", name, node))

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

    def note_call(self, name: str, args: list[Value], kwargs: dict[str, Value], result: Value, node: Any) -> None:
        """Write a foreign call down where its arguments matter: data or losses."""
        if any(each.toks or each.losses for each in args):
            self.note(
                events.Call, node, name=name, arguments=tuple(args), keywords=tuple(kwargs.items()), result=result
            )


__all__ = ["RAW", "Foreign", "Tok", "data_kind"]
