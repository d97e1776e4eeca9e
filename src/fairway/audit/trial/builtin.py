"""Python's own functions: range, len, min, sorted, print, open, and the rest that scripts call."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from fairway.audit.trial import files
from fairway.audit.trial.acting import Act, all_items, numeric, plain
from fairway.audit.trial.arrays import Array, limited, scalar
from fairway.audit.trial.core import Core
from fairway.audit.trial.files import Path, text_of
from fairway.audit.trial.given import key_of
from fairway.audit.trial.holding import held, made_dict
from fairway.audit.trial.ids import Id
from fairway.audit.trial.least import least, sum_in
from fairway.audit.trial.operators import PLAIN, combine
from fairway.audit.trial.patterns import is_a
from fairway.audit.trial.threads import Queue
from fairway.audit.trial.values import (
    UNKNOWN,
    Bound,
    Class,
    Frame,
    Func,
    Lib,
    Obj,
    Raised,
    Undecided,
    Unknown,
    Value,
    known,
    mixed,
)

_LONG = 4_096  # bits of a number


def _range(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    numbers = [scalar(each) for each in args]
    if not all(isinstance(each, (int, np.integer)) for each in numbers):
        return UNKNOWN
    made = range(*[int(each) for each in numbers])
    if len(made) == 1:
        machine.cut(made.stop - made.start, made.step)
    return made


def _len(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    (value,) = args
    if isinstance(value, Obj):
        method = value.kind.find("__len__")
        return method(value) if method is not None else len(value.vars) if value.kind.made == "tuple" else UNKNOWN
    if isinstance(value, Class):
        return len(value.members) or UNKNOWN
    sized: Value = value
    return len(sized) if isinstance(value, (*PLAIN, Array, Queue, files.Raw)) else UNKNOWN


def _extreme(name: str) -> Act:
    """min, max: of known numbers. Of what is unknown beside numbers nobody knows; beside sums, a sum."""

    def act(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        given = list(all_items(machine, args[0])) if len(args) == 1 else list(args)
        if not given:
            return kwargs.get("default", UNKNOWN)
        key = kwargs.get("key")
        keys = [scalar(machine.call(key, (each,), {}, line) if key is not None else each) for each in given]
        sums = [found for each in keys if (found := sum_in(each)) is not None]
        if len(sums) > 1 and name == "min":
            return least(machine, given, sums, line)
        if key is None and sums:
            return sums[0]
        if key is None:
            if not all(known(each) and not isinstance(each, (Array, Obj)) for each in keys):
                return mixed(*keys)
            return {"min": min, "max": max}[name](keys)
        if not all(isinstance(each, (int, float, str, tuple)) for each in keys):
            return given[0]
        at = {"min": min, "max": max}[name](range(len(keys)), key=keys.__getitem__)
        return given[at]

    return act


def _sum(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    total: Value = args[1] if len(args) > 1 else kwargs.get("start", 0)
    for each in machine.items(args[0]):
        machine.step()
        total = combine("Add", total, each)
    return total


def _sorted(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    values = all_items(machine, args[0])
    key = kwargs.get("key")
    keys = [scalar(machine.call(key, (each,), {}, line)) if key is not None else scalar(each) for each in values]
    keys = [tuple(scalar(part) for part in each) if isinstance(each, (tuple, list)) else each for each in keys]
    try:
        order = sorted(range(len(values)), key=keys.__getitem__, reverse=bool(kwargs.get("reverse", False)))
    except (TypeError, Undecided):
        return values
    return [values[n] for n in order]


def _isinstance(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    value, kinds = args
    if isinstance(value, Unknown):
        return UNKNOWN
    return any(is_a(value, kind) for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


def _getattr(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    if not isinstance(args[1], str):
        return UNKNOWN
    try:
        found = machine.attribute(args[0], args[1])
    except Raised as error:
        if len(args) > 2 and error.kind == "AttributeError":
            return args[2]
        raise
    return args[2] if len(args) > 2 and isinstance(found, Unknown) and not isinstance(args[0], Unknown) else found


def _hasattr(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    if isinstance(args[0], Obj):
        try:
            return not isinstance(machine.attribute(args[0], args[1]), Unknown)
        except Raised:
            return False
    return UNKNOWN


def _setattr(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    if isinstance(args[1], str):
        machine.assign_attribute(args[0], args[1], args[2])
    return None


def printed(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    for each in args:
        _shown(machine, each, line)
    return None


def _shown(machine: Core, value: Value, line: int, deep: int = 0) -> None:
    if isinstance(value, dict) and deep < 4:
        value = list(value.values())
    if isinstance(value, (list, tuple)) and deep < 4 and len(value) < 100:
        for each in value:
            _shown(machine, each, line, deep + 1)
    else:
        machine.shown(value, line)


def _str(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    if not args:
        return ""
    machine.shown(args[0], line)
    value = scalar(args[0])
    return str(value)[:1000] if isinstance(value, (int, float, str, Path)) else "?"


def _next(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    source = args[0]
    if isinstance(source, Unknown):
        return source
    if isinstance(source, Obj):
        method = source.kind.find("__next__")
        return method(source) if method is not None else UNKNOWN
    try:
        return next(source)
    except StopIteration:
        if len(args) > 1:
            return args[1]
        raise Raised("StopIteration") from None


def _enumerate(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    start = kwargs.get("start", args[1] if len(args) > 1 else 0)
    return enumerate(machine.items(args[0]), scalar(start))


def _int(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """A token's id keeps its place."""
    found = scalar(args[0]) if args else 0
    return found if isinstance(found, Id) else numeric(int)(machine, args, kwargs, line)


def _from_keys(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """dict.fromkeys(keys, value)"""
    keys = [key_of(each) for each in machine.items(args[0])] if args else []
    return UNKNOWN if any(isinstance(key, Unknown) for key in keys) else dict.fromkeys(keys, *args[1:2])


def _zip(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    sized = any(isinstance(each, (list, tuple, range, Array)) for each in args)  # as many rows as there are windows
    rows = (itertools.repeat(each) if sized and isinstance(each, Unknown) else machine.items(each) for each in args)
    return zip(*rows, strict=False)


def _map(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    func, *sources = args
    return (machine.call(func, each, {}, line) for each in zip(*[machine.items(one) for one in sources], strict=False))


def _filter(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    func, source = args
    return (
        each
        for each in machine.items(source)
        if machine.truth(each if func is None else machine.call(func, (each,), {}, line))
    )


def _pow(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """pow(x, y), and pow(x, -1, 1 << 64) of whole numbers."""
    given = [scalar(each) for each in args]
    if len(given) < 3:
        return combine("Pow", *args)
    short = all(isinstance(each, int) and each.bit_length() <= _LONG for each in given)
    return pow(*map(int, given)) if short else mixed(*args)


def _hash(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """Of whole numbers, and of pairs and rows of them; of a text another one in each run."""
    return hash(args[0]) if _is_whole(args[0]) else UNKNOWN


def _is_whole(value: Value) -> bool:
    return all(map(_is_whole, value)) if isinstance(value, tuple) else isinstance(value, (int, np.integer))


def _bytes(kind: type[bytes] | type[bytearray]) -> Act:
    def act(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        source = scalar(args[0]) if args else b""
        if isinstance(source, int):
            limited(source)
        known = isinstance(source, (int, bytes, bytearray)) or (
            isinstance(source, (list, tuple, range)) and all(isinstance(each, int) for each in source)
        )
        return kind(source) if known else mixed(*args)

    return act


def _truth(all_of: bool) -> Act:
    def act(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        unsure = False
        for each in machine.items(args[0]):
            machine.step()
            try:
                if machine.truth(each) is not all_of:
                    return not all_of
            except Undecided:
                unsure = True
        return UNKNOWN if unsure else all_of

    return act


def _bool(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    try:
        return machine.truth(args[0]) if args else False
    except Undecided:
        return UNKNOWN


def _callable(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    return isinstance(args[0], (Func, Bound, Class)) or (isinstance(args[0], Obj) and args[0].kind.is_module)


def _type(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    if len(args) == 3:
        return Class(str(args[0]), list(args[1]), dict(args[2]))
    return args[0].kind if isinstance(args[0], Obj) else Lib(type(args[0]).__name__)


def _reversed(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    return iter(all_items(machine, args[0])[::-1])


def _error(kind: str) -> Act:
    return lambda machine, args, kwargs, line: Raised(kind, args[0] if args else None)


_ERRORS = (
    "ValueError",
    "RuntimeError",
    "TypeError",
    "KeyError",
    "IndexError",
    "FileNotFoundError",
    "OSError",
    "AssertionError",
    "Exception",
    "NotImplementedError",
    "SystemExit",
    "StopIteration",
    "AttributeError",
    "ImportError",
    "ModuleNotFoundError",
    "KeyboardInterrupt",
    "TimeoutError",
    "MemoryError",
    "EOFError",
    "ZeroDivisionError",
    "PermissionError",
    "BaseException",
)


BUILTIN: dict[str, Act] = {
    "range": _range,
    "len": _len,
    "min": _extreme("min"),
    "max": _extreme("max"),
    "sum": _sum,
    "math.fsum": _sum,
    "sorted": _sorted,
    "isinstance": _isinstance,
    "issubclass": lambda machine, args, kwargs, line: UNKNOWN,
    "getattr": _getattr,
    "hasattr": _hasattr,
    "setattr": _setattr,
    "print": printed,
    "str": _str,
    "repr": _str,
    "next": _next,
    "iter": lambda machine, args, kwargs, line: (
        machine.items(args[0]) if len(args) == 1 else _until(machine, args, line)
    ),
    "enumerate": _enumerate,
    "zip": _zip,
    "map": _map,
    "filter": _filter,
    "pow": _pow,
    "hash": _hash,
    "bytes": _bytes(bytes),
    "bytearray": _bytes(bytearray),
    "list": held(list),
    "tuple": held(tuple),
    "set": held(set),
    "frozenset": held(frozenset),
    "dict": made_dict,
    "any": _truth(False),
    "all": _truth(True),
    "bool": _bool,
    "callable": _callable,
    "type": _type,
    "reversed": _reversed,
    "int": _int,
    "dict.fromkeys": _from_keys,
    "builtins.dict.fromkeys": _from_keys,
    "float": numeric(float),
    "round": numeric(round),
    "abs": numeric(abs),
    "divmod": numeric(divmod),
    "ord": numeric(ord),
    "chr": numeric(chr),
    "slice": plain(slice),
    "id": plain(lambda value: UNKNOWN if isinstance(value, Unknown) else id(value)),
    "vars": lambda machine, args, kwargs, line: args[0].vars if args and isinstance(args[0], (Obj, Class)) else UNKNOWN,
    "open": lambda machine, args, kwargs, line: files.opened(
        text_of(args[0]) or "", args[1] if len(args) > 1 else kwargs.get("mode", "r")
    ),
    "object": lambda machine, args, kwargs, line: Obj(Class("object", [], {})),
    "exec": lambda machine, args, kwargs, line: _executed(machine, line),
    **{name: _error(name) for name in _ERRORS},
}


def _until(machine: Core, args: tuple[Value, ...], line: int) -> Any:
    """iter(func, sentinel)."""
    while True:
        machine.step()
        found = machine.call(args[0], (), {}, line)
        if isinstance(found, Unknown) or found is args[1] or (isinstance(found, PLAIN) and found == args[1]):
            return
        yield found


def _executed(machine: Core, line: int) -> Value:
    """exec(text): the layer that was unpacked from it."""

    layer = machine.layer(("exec", "run"), lambda each: each.line == line)
    if layer is not None:
        frame = Frame(None)
        frame.vars.update({"__name__": "__main__", "__file__": machine.entry.path})
        machine.body(layer.script, frame)
    return None
