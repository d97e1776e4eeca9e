"""What holds values: dicts, deques, counters, dataclasses, named tuples, partial functions, itertools."""

from __future__ import annotations

import collections
import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fairway.audit.settings import UNKNOWN as UNSET
from fairway.audit.trial.acting import Act, all_items
from fairway.audit.trial.arrays import Array, limited, scalar
from fairway.audit.trial.calls import Decorator, Field
from fairway.audit.trial.core import Core
from fairway.audit.trial.displays import hashable
from fairway.audit.trial.operators import combine
from fairway.audit.trial.values import MISSING, UNKNOWN, Class, Lib, Obj, Raised, Unknown, Value


def held(kind: Callable[..., Any]) -> Act:
    """list, tuple, set, deque of what can be gone over."""

    def act(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        if not args:
            return kind(**kwargs)
        values = []
        for each in machine.items(args[0]):
            machine.step()
            values.append(each)
        if kind in (set, frozenset):
            values = [each for each in values if hashable(each)]
        return kind(values, *args[1:], **kwargs)

    return act


def environment(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """dict(os.environ): what the run command says of its switches, and nothing else."""
    said = machine.settings.environment.items()
    return {name: UNKNOWN if text is UNSET else text for name, text in said}


def made_dict(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    pairs: Any = ()
    if args:
        if isinstance(args[0], Unknown):
            return UNKNOWN
        if isinstance(args[0], Lib) and args[0].path == "os.environ":
            return environment(machine, (), {}, line) | kwargs
        pairs = (
            args[0] if isinstance(args[0], dict) else [tuple(machine.items(each)) for each in machine.items(args[0])]
        )
    return dict(pairs, **kwargs)


def spelt(text: Value) -> Value:
    """json.loads: of a text that is known what it says."""
    if not isinstance(text, (str, bytes)):
        return UNKNOWN
    try:
        found: Value = json.loads(text)
    except ValueError as error:
        raise Raised("JSONDecodeError", str(error)) from None
    return found


def copied(value: Value, **fields: Value) -> Value:
    """copy.copy(value), dataclasses.replace(value, field=...): another object with the same fields, but for these."""
    if isinstance(value, Obj):
        return Obj(value.kind, {**value.vars, **fields})
    return value.copy() if isinstance(value, (list, dict, set)) else value


def deepcopy(value: Value, *_: Value, **__: Value) -> Value:
    memory: dict[int, Value] = {}

    def copied(each: Value, depth: int = 0) -> Value:
        if id(each) in memory or depth > 30:
            return memory.get(id(each), each)
        if isinstance(each, Array):
            found: Value = each.all(np.array)
        elif isinstance(each, Obj):
            found = memory[id(each)] = Obj(each.kind)
            found.vars = {key: copied(one, depth + 1) for key, one in each.vars.items()}
        elif isinstance(each, dict):
            found = type(each)() if type(each) is dict else each.copy()
            found.update({key: copied(one, depth + 1) for key, one in each.items()})
        elif isinstance(each, (list, collections.deque)):
            found = type(each)(copied(one, depth + 1) for one in each)
        elif isinstance(each, tuple):
            found = tuple(copied(one, depth + 1) for one in each)
        else:
            return each
        memory[id(each)] = found
        return found

    return copied(value)


def counter(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    return collections.Counter([each for each in all_items(machine, args[0]) if hashable(each)] if args else [])


def named_tuple(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    names = args[1].replace(",", " ").split() if isinstance(args[1], str) else list(args[1])
    return Class(str(args[0]), [], {}, "tuple", [(name, None) for name in names])


def dataclass_field(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    factory = kwargs.get("default_factory")
    if factory is not None:
        return Field(lambda: machine.call(factory, (), {}, line))
    return Field(lambda: kwargs.get("default"))


def dataclass_fields(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """dataclasses.fields(settings): each with its name, and its default or what makes one."""
    kind = args[0].kind if isinstance(args[0], Obj) else args[0]
    if not isinstance(kind, Class):
        return UNKNOWN
    found = []
    for name, default in kind.all_fields().items():
        told: dict[str, Value] = {"name": name, "type": UNKNOWN, "default": MISSING, "default_factory": MISSING}
        value = default() if default is not None else MISSING
        told["default_factory" if isinstance(value, Field) else "default"] = (
            value.made if isinstance(value, Field) else value
        )
        found.append(Obj(Class("Field", [], {}), told))
    return tuple(found)


def type_hints(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """typing.get_type_hints(cls): the types of its fields, by name."""
    kind = args[0].kind if isinstance(args[0], Obj) else args[0]
    if not isinstance(kind, Class):
        return UNKNOWN
    return {name: hint() for each in reversed(list(kind.line())) for name, hint in each.hints.items()}


def is_dataclass(value: Value) -> Value:
    kind = value.kind if isinstance(value, Obj) else value
    return UNKNOWN if isinstance(value, Unknown) else isinstance(kind, Class) and kind.made == "dataclass"


def dataclass_kind(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    def act(kind: Value) -> Value:
        if isinstance(kind, Class):
            kind.made = "dataclass"
        return kind

    return act(args[0]) if args else Decorator(act)


def partial(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    func, *given = args

    def called(*more: Value, **named: Value) -> Value:
        return machine.call(func, (*given, *more), {**kwargs, **named}, line)

    return called


def reduced_by(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    values = all_items(machine, args[1])
    total = args[2] if len(args) > 2 else values.pop(0)
    for each in values:
        total = machine.call(args[0], (total, each), {}, line)
    return total


def iterated(name: str) -> Act:
    """itertools: what it is given is gone over by the machine."""

    def act(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        given: list[Value] = [
            machine.items(each)
            if hasattr(each, "__iter__") or isinstance(each, (Obj, Array, Unknown))
            else scalar(each)
            for each in args
        ]
        if name == "product":
            given = [list(each) for each in given]
            limited(10.0 * math.prod([len(each) for each in given]))
        return stepped(machine, getattr(itertools, name)(*given, **kwargs))

    return act


def in_batches(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """itertools.batched, which Python has from 3.12 on."""
    many, items = scalar(args[1] if len(args) > 1 else kwargs["n"]), iter(machine.items(args[0]))

    def found() -> Iterator[Value]:
        while batch := tuple(itertools.islice(items, many)):
            machine.step()
            yield batch

    return found()


def picked_by(name: str) -> Act:
    """itertools.takewhile, dropwhile, filterfalse."""

    def act(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        def holds(each: Value) -> bool:
            machine.step()
            return machine.truth(machine.call(args[0], (each,), {}, line))

        return getattr(itertools, name)(holds, machine.items(args[1]))

    return act


def starred(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """itertools.starmap"""
    return (machine.call(args[0], tuple(machine.items(each)), {}, line) for each in machine.items(args[1]))


def stepped(machine: Core, source: Iterator[Value]) -> Iterator[Value]:
    """What may have no end is gone over step by step."""
    for each in source:
        machine.step()
        yield each


def grouped(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """itertools.groupby: the groups as lists."""
    key = kwargs.get("key", args[1] if len(args) > 1 else None)
    found: list[tuple[Value, list[Value]]] = []
    for each in machine.items(args[0]):
        machine.step()
        name = scalar(machine.call(key, (each,), {}, line)) if key is not None else scalar(each)
        if not found or found[-1][0] != name:
            found.append((name, []))
        found[-1][1].append(each)
    return iter([(name, iter(group)) for name, group in found])


def chained(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    return itertools.chain.from_iterable(machine.items(each) for each in machine.items(args[0]))


def accumulated(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    total: Value = kwargs.get("initial")
    found = [] if total is None else [total]
    for each in machine.items(args[0]):
        total = each if total is None else combine("Add", total, each)
        found.append(total)
    return iter(found)
