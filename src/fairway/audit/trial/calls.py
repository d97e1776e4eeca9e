"""Calls: functions and classes of the script, methods, libraries, Python's own."""

from __future__ import annotations

import ast
from collections.abc import Callable, Generator, Iterator

import numpy as np

from fairway.audit.reading.tree import fluent
from fairway.audit.trial.arrays import Array, states_of, sum_of
from fairway.audit.trial.attributes import Attributes
from fairway.audit.trial.fitting import MAKERS
from fairway.audit.trial.growing import grown_in_place
from fairway.audit.trial.operators import combine
from fairway.audit.trial.sums import PLACE, Sum
from fairway.audit.trial.values import (
    BLANK,
    NET,
    UNKNOWN,
    Bound,
    Class,
    Frame,
    Func,
    Lib,
    Obj,
    Raised,
    Spent,
    Undecided,
    Unknown,
    Value,
    Wrapped,
    mixed,
    opaque,
)

DEPTH = 80


class Managed:
    """A `with` manager made by a generator function."""

    def __init__(self, steps: Iterator[Value]) -> None:
        self.steps = steps


class Calls(Attributes):
    """A part of the machine."""

    def call(self, func: Value, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        """func(*args, **kwargs), whatever func is."""
        if isinstance(func, Func) and _without_class(args, kwargs):
            return self.of_module(func, args, kwargs)
        if isinstance(func, (Func, Bound)):
            return func(*args, **kwargs)
        if isinstance(func, Class):
            return self.instance(func, args, kwargs)
        if isinstance(func, Lib):
            return self.foreign(func, args, kwargs, line)
        if isinstance(func, Obj):
            return self.call_object(func, args, kwargs)
        if isinstance(func, Unknown):
            given = (*args, *kwargs.values())
            asked = [each for each in given if isinstance(each, Array) and each.pos is not None]
            return states_of(asked) if asked else mixed(func, *given)  # a model that came out of a file
        if callable(func):
            return self.native(func, args, kwargs)
        return UNKNOWN

    def native(self, func: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """A method of a Python value, or a function of ours: what goes wrong in it goes wrong in the script."""
        try:
            return func(*args, **kwargs)
        except (Raised, Spent, Undecided):
            raise
        except RecursionError:
            raise
        except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, StopIteration) as error:
            if any(_unknown_in(arg) for arg in (*args, *kwargs.values())):
                return mixed(*args)
            if isinstance(error, KeyError) and opaque(getattr(func, "__self__", None)):
                return UNKNOWN
            raise Raised(type(error).__name__, str(error)) from None

    def call_object(self, me: Obj, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        method = me.vars.get("forward") if me.kind.is_module else None
        if method is None:
            method = me.kind.find("__call__")
        if method is None and me.kind.is_module:
            method = me.kind.find("forward")
            if isinstance(method, Func):
                return self.of_module(method, (me, *args), kwargs)
        if method is None:
            return mixed(*args)
        return self.call(
            method, (me, *args) if isinstance(method, Func) and "forward" not in me.vars else args, kwargs, 0
        )

    # -- functions ------------------------------------------------------------------------------------------------

    def call_function(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """A function of the script."""
        self.step()
        if self.depth > DEPTH:
            raise Spent
        frame = Frame(func.frame)
        frame.owner = func.owner
        frame.me = args[0] if args else None
        bound(func, frame, args, kwargs)
        if func.yields:
            steps = func.run(frame)
            return Managed(steps) if func.managed else self.resumed(steps)
        self.depth += 1
        self.stack.append(self.line)
        try:
            return func.run(frame)
        finally:
            self.depth -= 1
            self.line = self.stack.pop()

    def resumed(self, steps: Iterator[Value]) -> Generator[Value, Value, Value]:
        """A generator whose body runs below the line that first asked it for something."""
        line, sent = 0, None
        assert isinstance(steps, Generator)
        try:
            while True:
                before = self.line
                line = line or before
                self.stack.append(line)
                try:
                    value = steps.send(sent)
                except StopIteration as end:
                    return end.value
                finally:
                    self.stack.pop()
                    self.line = before
                sent = yield value
        finally:
            steps.close()

    def of_module(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """A method of a model: what it makes of tokens has one form, found at the first call."""
        given = [*args[1:], *kwargs.values()]
        tokens = [n for n, each in enumerate(given) if isinstance(each, Array) and each.pos is not None]
        if not tokens:
            return self._of_no_text(func, args, kwargs)
        key = (func, id(args[0]), *[_sort(each) for each in given], *kwargs)
        form = self.forms.get(key)
        if form is None:
            result = self.call_function(func, args, kwargs)
            self.forms[key] = _form(result, given, tokens)
            self.models.append(args[0])  # else another one might come to have its id
            return states_of([given[n] for n in tokens]) if result in (UNKNOWN, NET) else result
        if form[0] == "net":
            return states_of([given[n] for n in tokens])
        if form[0] == "none":
            return self.call_function(func, args, kwargs)
        target = given[form[1]]
        losses = self.losses(target)
        if form[0] == "mean":
            return self.booked(losses_mean(losses))
        if form[0] == "sum":
            return self.booked(sum_of(losses))
        return losses.all(lambda body: body.reshape(-1)) if form[0] == "flat" else losses

    def _of_no_text(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """A model on what is not of the text (training data, sums, pictures): unknown where arrays go in, and where
        nothing is known of what goes in."""
        given = [*args[1:], *kwargs.values()]
        if id(func.args) in fluent(self.script.tree):  # GPT(args).restored(torch.load(path))
            self.call_function(func, args, kwargs)
            return args[0]
        if any(isinstance(each, Array) for each in given) or (
            given and all(isinstance(each, Unknown) for each in given)
        ):
            self.apart += 1
            return NET
        return self.call_function(func, args, kwargs)

    # -- classes --------------------------------------------------------------------------------------------------

    def instance(self, kind: Class, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """A new object of a class of the script; of an Enum the value of a member, `Kind(1)`."""
        if args and kind.members:
            return args[0]
        me = Obj(kind)
        start = kind.find("__init__")
        if isinstance(start, Func):
            start(me, *args, **kwargs)
        elif kind.made or any(each.made for each in kind.line()):
            self._filled(me, args, kwargs)
        elif args and any("Error" in base.path or "Exception" in base.path for base in kind.foreign):
            me.vars["args"] = args
        return me

    def _filled(self, me: Obj, args: tuple[Value, ...], kwargs: dict[str, Value]) -> None:
        """The fields of a dataclass or a named tuple."""
        for n, (name, default) in enumerate(me.kind.all_fields().items()):
            if n < len(args):
                me.vars[name] = args[n]
            elif name in kwargs:
                me.vars[name] = kwargs[name]
            elif default is not None:
                value = default()
                me.vars[name] = value.made() if isinstance(value, Field) else value
            else:
                raise Raised("TypeError", f"{me.kind.name}() misses {name}")
        after = me.kind.find("__post_init__")
        if isinstance(after, Func):
            after(me)

    def decorated(self, value: Value, decorator: Value, line: int) -> Value:
        """@decorator on a function or class."""
        if isinstance(decorator, Lib):
            name = decorator.name
            if decorator.path in ("numba.njit", "numba.jit") and decorator.path in self.functions:
                return self.foreign(decorator, (value,), {}, line)
            if name in ("property", "cached_property", "staticmethod", "classmethod"):
                return Wrapped(name.removeprefix("cached_"), value)
            if name == "contextmanager" and isinstance(value, Func):
                value.managed = True
            if name == "dataclass" and isinstance(value, Class):
                value.made = "dataclass"
            return value
        if isinstance(decorator, (Func, Bound, Class)) or (
            isinstance(decorator, Obj) and decorator.kind.find("__call__")
        ):
            made = self.call(decorator, (value,), {}, line)
            return value if isinstance(made, Unknown) else made
        return decorator(value) if isinstance(decorator, Decorator) else value

    # -- libraries ------------------------------------------------------------------------------------------------

    def foreign(self, func: Lib, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        """A library's function: one that the trial has its own of, or unknown."""
        own = self.operators.get(func.path.removesuffix(".default")) if self.operators else None
        if own is not None and isinstance(entry := self.modules.get("__main__"), Obj) and own in entry.vars:
            return self.call(entry.vars[own], args, kwargs, line)
        made = self._of_library(func, args, kwargs, line)
        if not (isinstance(made, Unknown) and func.name in MAKERS and _of_arrays(func.path)):
            return made
        if not func.name.endswith("_like"):
            self.rows_made, self.made_at = _first_of(args), line
        return BLANK

    def _of_library(self, func: Lib, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        path = func.path
        if kwargs.get("requires_grad") is True and self.made:
            self.trial.fitted = True
            if func.name in MAKERS:
                self.rows_made, self.made_at = _first_of(args), line
                self.leaf()
        if path.startswith("torch.optim."):  # what it is for may have been made anew
            self.restored()
        if path.startswith("math.") and any(isinstance(each, Sum) and each.alone for each in args):
            self.bend(line)
        act = self.functions.get(path) or self.functions.get(f"*.{func.name}" if _of_arrays(path) else "")
        if act is None:
            if _of_arrays(path):
                return self.of_array(func.name, args, kwargs)
            return mixed(*args)
        try:
            return act(self, args, kwargs, line)
        except (Raised, Spent, Undecided, RecursionError):
            raise
        except StopIteration:
            raise Raised("StopIteration") from None
        except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
            return mixed(*args)

    # -- `with` and `except` --------------------------------------------------------------------------------------

    def enter(self, manager: Value) -> Value:
        if isinstance(manager, Managed):
            return next(manager.steps, None)
        if isinstance(manager, Obj):
            start = manager.kind.find("__enter__")
            return start(manager) if isinstance(start, Func) else manager
        begin = getattr(manager, "entered", None)
        return begin() if begin is not None else manager

    def leave(self, manager: Value, error: Raised | None) -> bool:
        """Whether the error is held back."""
        if isinstance(manager, Managed):
            if error is None:
                next(manager.steps, None)
                return False
            manager.steps.close()  # type: ignore[attr-defined]
            return False
        if isinstance(manager, Obj):
            end = manager.kind.find("__exit__")
            if isinstance(end, Func):
                return end(manager, None if error is None else error, None, None) is True
        finish = getattr(manager, "left", None)
        return bool(finish(error)) if finish is not None else False

    def caught(self, error: Raised, kind: Value) -> bool:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        for each in kinds:
            name = getattr(each, "name", "")
            if name in ("Exception", "BaseException", error.kind) or name in _ABOVE.get(error.kind, ()):
                return name != "Exception" or error.kind != "SystemExit"
            if isinstance(each, Class) and isinstance(error.value, Obj) and each in error.value.kind.line():
                return True
        return False

    def grown(self, name: str, old: Value, more: Value) -> Value:
        """old += more, in place where Python does it in place."""
        if isinstance(old, Array):
            return grown_in_place(name, old, more)
        if name == "Add" and isinstance(old, list):
            old.extend(self.items(more))
            return old
        if name == "BitOr" and isinstance(old, (dict, set)) and isinstance(more, type(old)):
            old.update(more)
            return old
        if isinstance(old, Obj):
            method = old.kind.find({"Add": "__iadd__", "Sub": "__isub__", "Mult": "__imul__"}.get(name, ""))
            if method is not None:
                return method(old, more)
        return combine(name, old, more)


def _unknown_in(value: Value) -> bool:
    parts = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(each, (Unknown, Sum, Array)) for each in parts)


class Field:
    """dataclasses.field(): made() gives the value of a new instance."""

    def __init__(self, made: Callable[[], Value]) -> None:
        self.made = made


class Decorator:
    """A library's decorator with arguments: what it leaves of a function."""

    def __init__(self, act: Callable[[Value], Value]) -> None:
        self.act = act

    def __call__(self, value: Value) -> Value:
        return self.act(value)


_ABOVE = {
    "KeyError": ("LookupError",),
    "IndexError": ("LookupError",),
    "ZeroDivisionError": ("ArithmeticError",),
    "ModuleNotFoundError": ("ImportError",),
    "FileNotFoundError": ("OSError", "IOError"),
}
_ARRAYS = ("torch", "numpy", "mlx", "jax", "cupy", "tinygrad", "triton", "np")


def _first_of(sizes: tuple[Value, ...]) -> int:
    """The first of the sizes that a tensor is made with, in a tuple or one by one; 0 where nobody knows it."""
    first = sizes[0] if sizes else 0
    if isinstance(first, (tuple, list)):
        first = first[0] if first else 0
    return first if isinstance(first, int) else 0


def _of_arrays(path: str) -> bool:
    return path.split(".")[0] in _ARRAYS


def _without_class(args: tuple[Value, ...], kwargs: dict[str, Value]) -> bool:
    """Whether a function is handed weights in a dict of which nothing is known, rows of tokens of the text, and nothing
    else that it could change, or call: `forward(w, ids, config)` is a method of a model without a class."""
    if not args or not opaque(args[0]):
        return False
    given = [*args[1:], *kwargs.values()]
    texts = [each for each in given if isinstance(each, Array)]
    if not texts or any(each.pos is None or len(each.shape) < 2 for each in texts):
        return False
    return not any(
        isinstance(each, (Func, Bound, Class, list, set, Sum)) or (isinstance(each, dict) and not opaque(each))
        for each in given
    )


def _sort(value: Value) -> Value:
    if isinstance(value, Array):
        return ("array", len(value.shape), value.pos is not None, value.lossy)
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def _form(result: Value, given: list[Value], tokens: list[int]) -> tuple[str, int]:
    """How a model's result follows from its arguments: losses of which of them, in what shape."""
    if isinstance(result, Unknown):
        return "net", 0
    for n in reversed(tokens):
        target = given[n].pos
        if isinstance(result, Array) and result.coef is not None and np.all(result.coef == 1.0):
            assert result.pos is not None
            plain = np.where(result.pos >= 0, result.pos & PLACE, -1)
            if plain.shape == target.shape and (plain == target).all():
                return "same", n
            if plain.shape == (target.size,) and (plain == target.reshape(-1)).all():
                return "flat", n
        if isinstance(result, Sum) and result.places is not None and result.weights is not None:
            inside = np.sort(target[target >= 0])
            found = np.sort(result.places & PLACE)
            if 0 < len(inside) == len(found) == target.size and (inside == found).all():
                return ("sum" if result.weights[0] == 1.0 else "mean"), n
    return "none", 0


def losses_mean(losses: Array) -> Sum:
    """mean(): over those that are of the text at all."""
    assert losses.pos is not None
    assert losses.coef is not None
    count = max(losses.pos.size, 1)
    inside = losses.pos >= 0
    return Sum(losses.pos[inside].astype(np.int32), losses.coef[inside] / count)


def bound(func: Func, frame: Frame, args: tuple[Value, ...], kwargs: dict[str, Value]) -> None:
    """The arguments of a call as names of its frame. TypeError of the script where they do not fit."""
    spec: ast.arguments = func.args
    names = [each.arg for each in (*spec.posonlyargs, *spec.args)]
    given = dict(zip(names, args, strict=False))
    if spec.vararg is not None:
        given[spec.vararg.arg] = args[len(names) :]
    elif len(args) > len(names):
        raise Raised("TypeError", f"{func.name}() takes {len(names)} arguments")
    rest: dict[str, Value] = {}
    for name, value in kwargs.items():
        if name in names or any(each.arg == name for each in spec.kwonlyargs):
            given[name] = value
        elif spec.kwarg is not None:
            rest[name] = value
        else:
            raise Raised("TypeError", f"{func.name}() has no argument {name}")
    if spec.kwarg is not None:
        given[spec.kwarg.arg] = rest
    for name, value in zip(reversed(names), reversed(func.defaults), strict=False):
        given.setdefault(name, value)
    for name, value in func.keyword_defaults.items():
        given.setdefault(name, value)
    missing = [name for name in names if name not in given]
    if missing:
        raise Raised("TypeError", f"{func.name}() misses {missing[0]}")
    frame.vars.update(given)
