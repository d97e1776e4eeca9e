"""Attributes, elements, items and truth of any value."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from fairway.audit.trial.arrays import LARGEST, Array, TooLarge, array_of, limited, put, taken
from fairway.audit.trial.files import File, Raw
from fairway.audit.trial.given import index_of, key_of
from fairway.audit.trial.ids import Id, mapped
from fairway.audit.trial.operators import PLAIN
from fairway.audit.trial.reading import read_into
from fairway.audit.trial.sums import Sum
from fairway.audit.trial.tensors import Arrays, array_attribute
from fairway.audit.trial.values import (
    BLANK,
    MISSING,
    NET,
    UNKNOWN,
    Bound,
    Class,
    Frame,
    Func,
    Lib,
    Obj,
    Raised,
    States,
    Super,
    Undecided,
    Unknown,
    Value,
    Wrapped,
    mixed,
    opaque,
)

if TYPE_CHECKING:
    pass

_LEVELS = frozenset(("debug", "info", "warning", "error", "critical"))
_SAME = frozenset(("detach", "float", "double", "half", "bfloat16", "to", "clone", "contiguous"))
_PICKING = {"gather", "take_along_dim", "take_along_axis", "index_select", "take"}
_ITSELF = {
    "to",
    "cuda",
    "cpu",
    "eval",
    "train",
    "float",
    "double",
    "half",
    "bfloat16",
    "requires_grad_",
    "share_memory",
}
_ITSELF |= {"set_dtype", "freeze", "unfreeze", "compile"}
_WIDE = {"ljust", "rjust", "center", "zfill", "expandtabs"}

_SUMS = 4_096  # numbers of an array that losses are added up in


@functools.cache
def _of_library(path: str, name: str) -> Value:
    """The eight trials of a script of 1,300 lines ask for 64,000 attributes."""
    return _CONSTANTS.get(f"{path}.{name}", Lib(f"{path}.{name}"))


class Attributes(Arrays):
    """A part of the machine."""

    def name(self, frame: Frame, name: str) -> Value:
        """A name's value: of the script, else Python's own."""
        found = frame.find(name)
        if found is not None:
            return found.vars[name]
        if name == "__class__":
            return frame.owner
        if name == "super":
            owner, me = self.inside(frame)
            return functools.partial(_super, owner, me)
        return Lib(name)

    def inside(self, frame: Frame) -> tuple[Value, Value]:
        """The class and the object of the method that a frame stands in."""
        each: Frame | None = frame
        while each is not None and each.owner is None:
            each = each.parent
        return (each.owner, each.me) if each is not None else (None, None)

    # -- attributes -----------------------------------------------------------------------------------------------

    def attribute(self, value: Value, name: str) -> Value:
        kind = type(value)
        if kind is Obj:
            return self.of_object(value, name)
        if kind is Lib:
            return _of_library(value.path, name)
        if isinstance(value, Unknown):
            if name in _PICKING and value.net:
                return functools.partial(self.gathered, value)
            if isinstance(value, States) and name in ("shape", "size"):
                sizes = (*value.sizes, UNKNOWN)
                return sizes if name == "shape" else lambda at=None: sizes if at is None else sizes[at]
            if isinstance(value, States) and name in _SAME:
                return lambda *_args, **_kwargs: value
            if name == "requires_grad_" and value is BLANK:
                return self.leaf
            if name == "step":
                return self.stepped
            if name == "requires_grad":  # which weights learn changes nothing of what is scored when
                return True
            if name in _LEVELS and not value.net:  # of a logger
                return functools.partial(self.told_by_format, "")
            return functools.partial(self.learn_unknown, value) if name == "backward" else value
        if isinstance(value, Array):
            return array_attribute(self, value, name)
        if isinstance(value, Sum):
            return self.of_sum(value, name)
        if isinstance(value, Class):
            return self.of_class(value, name)
        if isinstance(value, Func):
            return value.attributes.get(name, value.name if name in ("__name__", "__qualname__") else UNKNOWN)
        if isinstance(value, Super):
            found = value.me.kind.after(value.owner, name) if isinstance(value.me, Obj) else None
            if found is None:
                return functools.partial(_nothing)
            return self.tied(found, value.me, value.owner)
        if isinstance(value, str) and name in ("format", *_WIDE):
            return (
                functools.partial(self.told_by_format, value)
                if name == "format"
                else functools.partial(_widened, getattr(value, name))
            )
        if isinstance(value, Bound):
            return UNKNOWN
        if name == "value" and isinstance(value, (int, float, str)):
            return value  # of an Enum's member
        if isinstance(value, File) and name.startswith("readinto"):
            return functools.partial(read_into, self, value)
        if name.startswith("__") or not (
            isinstance(value, (*PLAIN, random.Random, functools.partial, Raised)) or _ours(value)
        ):
            return {"__name__": "", "__len__": UNKNOWN}.get(name, UNKNOWN)
        return getattr(value, name, UNKNOWN)

    def of_object(self, me: Obj, name: str) -> Value:
        if name in me.vars:
            return me.vars[name]
        found = me.kind.find(name)
        if found is not None:
            return self.tied(found, me, me.kind)
        if name == "__dict__":
            return me.vars
        if name == "__class__":
            return me.kind
        if name == "_asdict":
            return lambda: dict(me.vars)
        if name in ("_replace",):
            return lambda **new: Obj(me.kind, {**me.vars, **new})
        if name == "module" and me.kind.is_module:
            return me
        if me.kind.foreign:
            if name in _ITSELF:
                return lambda *args, **kwargs: me
            if name in ("register_buffer", "register_parameter", "add_module"):
                return lambda key, new=None, **kwargs: me.vars.__setitem__(key, new)
            if name == "load_state_dict":
                return lambda *args, **kwargs: self.restored()
            return UNKNOWN
        other = me.kind.find("__getattr__")
        if other is not None:
            return other(me, name)
        if me.kind.name == "module":
            return UNKNOWN
        raise Raised("AttributeError", name)

    def tied(self, found: Value, me: Value, kind: Class) -> Value:
        """A class's attribute as its instance has it."""
        if isinstance(found, Func):
            return Bound(me, found, self.method)
        if isinstance(found, Wrapped):
            if found.kind == "property":
                return self.call(found.func, (me,), {}, 0)
            return found.func if found.kind == "staticmethod" else functools.partial(found.func, kind)
        return found

    def method(self, bound: Bound, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        if isinstance(bound.me, Obj) and bound.me.kind.is_module and bound.what.name != "__init__":
            return self.of_module(bound.what, (bound.me, *args), kwargs)
        return self.call_function(bound.what, (bound.me, *args), kwargs)

    def of_class(self, kind: Class, name: str) -> Value:
        found = kind.find(name)
        if found is None:
            if name in ("__name__", "__qualname__"):
                return kind.name
            if name == "__dict__":
                return kind.vars
            if name == "apply" and any(base.name == "Function" for base in kind.foreign):
                return Lib("torch.autograd.Function.apply")
            return NET if kind.foreign else UNKNOWN
        if isinstance(found, Wrapped):
            return functools.partial(found.func, kind) if found.kind == "classmethod" else found.func
        return found

    def of_sum(self, value: Sum, name: str) -> Value:
        if name == "backward":
            return lambda *args, **kwargs: self.learn(value)
        if name in ("shape",):
            return ()
        if name == "add_" or name in ("dtype", "device", "requires_grad", "grad_fn"):
            return UNKNOWN
        return lambda *args, **kwargs: value

    def gathered(self, value: Unknown, *args: Value, **kwargs: Value) -> Value:
        """A model's numbers at tokens, by gather(): losses."""
        index = next((each for each in (*args, *kwargs.values()) if isinstance(each, Array)), None)
        return value if index is None else self.picked(value, index)

    def leaf(self, *_: Value, **__: Value) -> Value:
        """A tensor of nothing that is learned, made where losses were made before: a vector for windows to come."""
        if self.made:
            self.trial.fitted = True
            self.fitting.made_anew(self.rows_made)
            self.rows_made = 0
        return UNKNOWN

    def stepped(self, closure: Value = None, **_: Value) -> Value:
        """optimizer.step(closure): what makes the loss, and learns from it, is called."""
        return self.call(closure, (), {}, self.line) if isinstance(closure, (Func, Bound)) else UNKNOWN

    def learn_unknown(self, value: Unknown, *_: Value, **__: Value) -> None:
        self.learn(value)

    def told_by_format(self, text: str, *args: Value, **kwargs: Value) -> str:
        for each in (*args, *kwargs.values()):
            self.shown(each, 0)
        return text[:1000]

    def assign_attribute(self, value: Value, name: str, new: Value) -> None:
        if isinstance(value, Obj):
            found = value.kind.find(name)
            if isinstance(found, Wrapped) and found.kind == "property":
                return
            value.vars[name] = new
        elif isinstance(value, Class):
            value.vars[name] = new
        elif isinstance(value, Func):
            value.attributes[name] = new

    # -- elements -------------------------------------------------------------------------------------------------

    def item(self, value: Value, index: Value) -> Value:
        if isinstance(index, Id) and isinstance(value, (Unknown, Array)):
            index = array_of(index)
        if isinstance(value, Lib) and value.path in ("numpy.s_", "numpy.index_exp"):
            return index
        if isinstance(value, Unknown):
            return self.picked(value, index)
        if isinstance(value, Array):
            place = index_of(index)
            if isinstance(place, Unknown):
                return mixed(place)
            if value.pos is not None and value.pos.size and value.pos.flat[-1] >= 0:
                self.touched += 1
                if value.pos.size >= self.trial.length - 1:
                    self.cut_at[tuple(self.stack)] = self.line
            try:
                if isinstance(place, np.ndarray) and place.dtype != bool and value.pos is None:  # a row for each place
                    limited(float(place.size * np.prod(value.shape[1:])))
                part = taken(value, place)
            except TooLarge:
                return UNKNOWN
            except IndexError as error:
                raise Raised("IndexError", str(error)) from None
            if isinstance(part, Array) and part.pos is not None and value.body.size >= self.trial.length - 1:
                self.trial.reached(tuple(self.stack), part.pos)
            if isinstance(part, Array) and isinstance(place, np.ndarray):
                part.rows = place.sum(axis=1) if place.dtype == bool and place.ndim == 2 else _rows_of(index, part)
                part.pos = mapped(index, part) if isinstance(index, Array) and part.pos is None else part.pos
            if isinstance(part, Array) and part.body.base is None:  # a copy: places that an array names
                self.weigh(part)
            elif isinstance(part, Array) and value.pos is None and value.body.size <= _SUMS:
                part.whole = value, place
            return part
        if isinstance(value, Lib) and value.path == "os.environ":
            return self.call(Lib("os.environ.get"), (index,), {}, 0)
        if isinstance(value, (Sum, Lib, Class)):
            return value
        if isinstance(value, Raw):
            return value[key_of(index)]
        if isinstance(value, Obj):
            method = value.kind.find("__getitem__")
            if method is not None:
                return self.call(method, (value, index), {}, 0)
            if any(each.made == "tuple" for each in value.kind.line()):
                return self.item(tuple(value.vars.values()), index)
            return UNKNOWN
        if isinstance(value, PLAIN):
            key = key_of(index)
            if isinstance(key, (Unknown, Array)) or _open(key):
                return mixed(key)
            if isinstance(value, dict) and key not in value and (UNKNOWN in value or opaque(value)):
                return UNKNOWN  # it may be among the keys that nobody knows
            try:
                found: Value = value
                return found[key]
            except (LookupError, TypeError, ValueError) as error:
                raise Raised(type(error).__name__, str(error)) from None
        return UNKNOWN

    def picked(self, value: Unknown, index: Value) -> Value:
        """Unknown numbers at the places that token ids name: of a model, what it says of these targets."""
        parts = index if isinstance(index, tuple) else (index,)
        arrays = [part for part in parts if isinstance(part, Array) and part.num is not None and part.num.dtype != bool]
        tokens = [part for part in arrays[-1:] if part.pos is not None and bool((part.pos >= 0).any())]
        if not value.net or not tokens:  # rows and columns of positions are none
            rows = isinstance(value, States) and (not parts or parts[0] != slice(None))
            return NET if rows else value
        target = tokens[-1]
        if any(part.shape != target.shape for part in arrays):
            shape = np.broadcast_shapes(*[part.shape for part in arrays])
            return self.losses(target.all(lambda body: np.broadcast_to(body, shape)))
        return self.losses(Array(target.num, target.pos, target.coef).as_picked(target))

    def assign_item(self, value: Value, index: Value, new: Value) -> None:
        if isinstance(value, Array):
            place = index_of(index)
            if self.pieces and not self.trial.table and type(new) is int and new > 1:
                self.trial.table = self.line
            if not isinstance(place, Unknown):
                try:
                    put(value, place, new)
                except IndexError as error:
                    raise Raised("IndexError", str(error)) from None
                except (ValueError, TypeError):
                    return
        elif isinstance(value, Obj):
            method = value.kind.find("__setitem__")
            if method is not None:
                self.call(method, (value, index, new), {}, 0)
        elif isinstance(value, (list, dict, bytearray)):
            key = key_of(index)
            if (isinstance(key, Unknown) or _open(key)) and isinstance(value, dict):
                value[UNKNOWN] = new
            elif not isinstance(key, (Unknown, Array)):
                try:
                    value[key] = list(self.items(new)) if isinstance(key, slice) else new
                except (LookupError, TypeError, ValueError) as error:
                    raise Raised(type(error).__name__, str(error)) from None

    def delete_item(self, value: Value, index: Value) -> None:
        key = key_of(index)
        if isinstance(value, (list, dict)) and not isinstance(key, (Unknown, Array)):
            try:
                del value[key]
            except (LookupError, TypeError) as error:
                raise Raised(type(error).__name__, str(error)) from None

    # -- items, truth ---------------------------------------------------------------------------------------------

    def items(self, value: Value) -> Iterator[Value]:
        """What a loop goes over. Of what nobody knows: once."""
        if isinstance(value, Unknown):
            return iter((value,))
        if isinstance(value, Array):
            return (taken(value, n) for n in range(len(value.body) if value.body.ndim else 0))
        if isinstance(value, Obj):
            return self._items_of(value)
        if isinstance(value, range) and abs(value.stop - value.start) > LARGEST:
            return self._stepped(value)
        if isinstance(value, Class):
            return iter(value.members.values())
        if isinstance(value, (Lib, Func, Sum)) or not hasattr(value, "__iter__"):
            return iter(())
        return iter(value)

    def _stepped(self, value: range) -> Iterator[Value]:
        for each in value:
            self.step()
            yield each

    def _items_of(self, me: Obj) -> Iterator[Value]:
        start = me.kind.find("__iter__")
        if start is not None:
            found = start(me)
            if isinstance(found, Obj) and found.kind.find("__next__") is not None:
                return self._nexts(found)
            return self.items(found)
        if any(each.made == "tuple" for each in me.kind.line()):
            return iter(list(me.vars.values()))
        length, element = me.kind.find("__len__"), me.kind.find("__getitem__")
        if length is not None and element is not None:
            count = length(me)
            return (element(me, n) for n in range(count if isinstance(count, int) else 1))
        return iter((NET if me.kind.is_module else UNKNOWN,))

    def _nexts(self, me: Obj) -> Iterator[Value]:
        after = me.kind.find("__next__")
        while True:
            try:
                value = after(me)
            except Raised as error:
                if error.kind == "StopIteration":
                    return
                raise
            yield value

    def truth(self, value: Value) -> bool:
        """Undecided where it hangs on what is not known."""
        if type(value) is bool:
            return value
        if isinstance(value, (Unknown, Sum)):
            raise Undecided
        if isinstance(value, Array):
            if value.lossy or value.body.size != 1 or value.num is None or value.num.dtype == object:
                raise Undecided
            return bool(value.num.reshape(-1)[0])
        if isinstance(value, Obj):
            for name in ("__bool__", "__len__"):
                method = value.kind.find(name)
                if method is not None:
                    return bool(self.truth(method(value)))
            return True
        return bool(value)


def _rows_of(index: Value, part: Array) -> np.ndarray | None:
    """Of an index that a mask had picked out of a table, the rows it came from, where each place gave one element."""
    return index.rows if isinstance(index, Array) and index.shape == part.shape else None


def _open(key: Value) -> bool:
    """A key of which a part is not known."""
    return isinstance(key, tuple) and any(isinstance(part, (Unknown, Array)) for part in key)


def _super(owner: Value, me: Value, *args: Value) -> Value:
    return Super(args[0] if args else owner, args[1] if len(args) > 1 else me)


def _nothing(*args: Value, **kwargs: Value) -> Value:
    return UNKNOWN


def _widened(turn: Callable[..., str], width: int, *args: Value) -> str:
    limited(1000.0 * int(width))
    return turn(width, *args)


def _ours(value: Value) -> bool:
    return type(value).__module__.startswith(("fairway.audit.trial", "fairway.audit.preparing"))


_CONSTANTS: dict[str, Value] = {
    "math.pi": float(np.pi),
    "math.e": float(np.e),
    "math.inf": float("inf"),
    "math.nan": float("nan"),
    "numpy.pi": float(np.pi),
    "numpy.e": float(np.e),
    "numpy.inf": float("inf"),
    "torch.inf": float("inf"),
    "numpy.newaxis": None,
    "dataclasses.MISSING": MISSING,
    "sys.argv": ["train_gpt.py"],
    "sys.maxsize": 2**63 - 1,
    "os.sep": "/",
    "sys.byteorder": "little",
    "sys.version": "3.12",
    "sys.version_info": (3, 12, 0),
}
