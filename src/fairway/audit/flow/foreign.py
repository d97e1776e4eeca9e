"""Functions that are not in the script: builtins, the standard library, torch."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from typing import Any

from fairway.audit.flow.heap import Obj
from fairway.audit.flow.operators import Operators
from fairway.audit.flow.values import (
    LENGTH,
    MISSING,
    NO_OBJECTS,
    NONE,
    NOTHING,
    NUMBER,
    RANKED,
    Value,
    blend,
)
from fairway.audit.reading.kernels import operators
from fairway.audit.settings import UNKNOWN

PASSES = frozenset(
    ("compile", "script", "jit", "remat", "DistributedDataParallel", "DDP", "DataParallel", "FSDP",
     "FullyShardedDataParallel", "njit", "wraps", "lru_cache", "cache", "no_grad", "inference_mode", "autocast",
     "contextmanager", "fully_shard",
     "prepare", "disable", "unwrap_model", "tqdm", "assume_constant_result", "allow_in_graph", "dynamo_disable",
     "Variable", "convert_sync_batchnorm", "checkpoint_wrapper", "optimize", "AveragedModel", "pmap", "custom_fwd",
     "custom_bwd", "once_differentiable", "total_ordering")
)  # fmt: skip
SAYS = frozenset(("print", "info", "warning", "debug", "error", "critical", "log_metrics", "pprint", "secho", "echo"))
NUMBERS: dict[str, Callable[..., Any]] = {
    "int": int, "float": float, "bool": bool, "str": str, "abs": abs, "round": round, "repr": repr,
    "ceil": math.ceil, "floor": math.floor, "sqrt": lambda x: x**0.5 if x >= 0 else MISSING, "ord": ord, "chr": chr,
}  # fmt: skip
RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "0"}
_CLASSES = frozenset(("dict", "list", "set", "str", "bytes", "bytearray", "deque", "OrderedDict", "Tensor"))
LOADS = frozenset(
    ("fromfile", "memmap", "load", "loadtxt", "load_dataset", "load_file", "safe_open", "from_file", "read_table",
     "read_parquet", "read_csv", "genfromtxt", "load_from_disk", "mmap", "loads_file")
)  # fmt: skip
UNPACKS = frozenset(("loads", "frombuffer", "decompress", "b85decode", "b64decode", "a85decode", "BytesIO", "StringIO"))


class Foreign(Operators):
    """foreign(name, args): what a function outside the script gives."""

    def outside_call(self, name: str, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """name(*args, **kwargs)"""
        own = operators(self.frame.script.tree).get(name.removesuffix(".default"), "")
        if own in self.frame.globals.slots:  # torch.ops.space.name, which the script adds itself
            return self.call(self.frame.globals.slots[own], args, kwargs, node)
        last = name.rsplit(".", 1)[-1]
        if "reduce" in last or "gather" in last:
            self.together(args)
        operated = self.outside_operator(name, args, kwargs, node)
        if operated is not None:
            return operated
        if args and _unbound(name):
            return self.method(args[0], last, args[1:], kwargs, node)
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
        flats = [self.flat(self.spoken(each, node)) for each in args]
        value = blend(*flats) if flats else NOTHING
        words = tuple(str(each.const)[:200] for each in flats if isinstance(each.const, str))
        if value.losses:
            self.said(value, Value(words=words), node, "printed")
        where = kwargs.get("file")
        if where is not None:
            for obj in where.refs:
                if "#path" in obj.slots and (value.losses or "#grows" not in obj.slots):  # else a line of a log
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
        if last == "str" and any("#path" in obj.slots for obj in value.refs):
            return self.path_of(value)
        flat = self.flat(value)
        if last in ("str", "repr") and not flat.words and flat.const is not MISSING:
            return Value(words=(str(flat.const)[:200],))
        if last in ("floor", "ceil") and not flat.losses & ~self.logs:
            flat = flat.but(losses=0)  # the logarithm of a count, as a level
        if last == "float" and flat.states and flat.choices and not (flat.toks or flat.losses):
            flat = flat.but(flags=flat.flags | NUMBER)
        return flat.but(const=MISSING, items=None)

    # Settings.
    def setting(self, name: Value, default: Value) -> Value:
        """An environment variable: what the run command sets, else the default."""
        if not isinstance(name.const, str):
            return default.but(const=MISSING) if default.const is not MISSING else default
        env = frozenset((name.const,))
        if name.const in RANKS:
            return Value(const=RANKS[name.const], env=RANKED if RANKS[name.const] == "0" else frozenset())
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

    def _do_items(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """os.environ.items(): what the run command says of its switches, and nothing else."""
        if not name.startswith("os.environ."):
            return None
        held = self.new("dict", None, node)
        self._update(held, self.outside("os.environ"), node)
        return self.method(self.ref(held), name.rpartition(".")[2], [], {}, node)

    _do_keys = _do_values = _do_items

    def _do_ArgumentParser(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        parser = self.new("thing", "argparse", node)
        for parent in self.elements(kwargs.get("parents", NOTHING), node).exact or ():
            for obj in parent.refs:  # their options are its own
                parser.slots.update({key: value for key, value in obj.slots.items() if isinstance(value, Value)})
        return self.ref(parser)

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
            switch = action in ("store_true", "store_false")
            default = kwargs.get("default", Value(const=action == "store_false") if switch else NONE)
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


def _unbound(name: str) -> bool:
    """Whether it is a method asked of its class: `dict.update(table, ...)`, `torch.Tensor.add_(x, y)`."""
    owner, _, method = name.rpartition(".")
    return owner.rsplit(".", 1)[-1] in _CLASSES and method not in ("fromkeys", "maketrans", "__new__", "__init__")
