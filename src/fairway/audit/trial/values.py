"""What a trial computes with: Python's own values, arrays, sums of losses, and what nobody knows."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

Value: TypeAlias = Any
"""A number, text, container, Array, Sum, Func, Class, Obj, Lib or UNKNOWN."""


class Unknown:
    """What the trial does not know. net: a model made it, so that picking one of its entries by a target is a loss."""

    __slots__ = ("net",)

    def __init__(self, net: bool) -> None:
        self.net = net

    def __repr__(self) -> str:
        return "NET" if self.net else "UNKNOWN"

    def __bool__(self) -> bool:
        raise Undecided


class States(Unknown):
    """What a model makes of rows of tokens: numbers for each of them. sizes: rows, and tokens of each."""

    __slots__ = ("sizes",)

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__(True)
        self.sizes = sizes


UNKNOWN: Final = Unknown(False)
NET: Final = Unknown(True)


def opaque(value: Value) -> bool:
    """Whether nothing is known of all that lies in a dict: weights out of a file, and whatever else was in it."""
    return isinstance(value, dict) and bool(value) and all(isinstance(each, Unknown) for each in value.values())


BLANK: Final = Unknown(False)
"""A tensor of noughts, ones or noise, of a shape that nobody knows: what vectors begin as."""


class Undecided(Exception):
    """A condition hangs on what is not known."""


class Spent(BaseException):
    """The trial's bounds are reached: steps, size, depth. No `except` of the script catches it."""


class Raised(Exception):
    """The script raises. kind: the name of the exception's class; value: the object."""

    def __init__(self, kind: str, value: Value = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.value = value


@dataclass(frozen=True)
class Lib:
    """A name of a library, as `torch.nn.functional.cross_entropy`."""

    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


class Frame:
    """The names of one call, of a class body or of the module."""

    __slots__ = ("elsewhere", "me", "owner", "parent", "top", "vars")

    def __init__(self, parent: Frame | None) -> None:
        self.vars: dict[str, Value] = {}
        self.parent = parent
        self.top: Frame = parent.top if parent is not None else self
        self.elsewhere: dict[str, Frame] = {}  # names declared global or nonlocal
        self.owner: Class | None = None
        self.me: Value = None

    def find(self, name: str) -> Frame | None:
        """The frame that has this name."""
        frame: Frame | None = self.elsewhere.get(name, self)
        while frame is not None:
            if name in frame.vars:
                return frame
            frame = frame.parent
        return None

    def bind(self, name: str, value: Value) -> None:
        self.elsewhere.get(name, self).vars[name] = value


@dataclass(eq=False)
class Func:
    """A function of the script. run: its body, given a frame with its arguments bound; frame: where it was made."""

    name: str
    args: ast.arguments
    run: Callable[[Frame], Value]
    frame: Frame
    call: Callable[..., Value]  # the machine's own: call(self, args, kwargs)
    defaults: list[Value] = field(default_factory=list)
    keyword_defaults: dict[str, Value] = field(default_factory=dict)
    owner: Class | None = None
    yields: bool = False
    managed: bool = False  # @contextmanager
    attributes: dict[str, Value] = field(default_factory=dict)

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        return self.call(self, args, kwargs)


MISSING: Final = Lib("dataclasses.MISSING")


@dataclass(eq=False)
class Class:
    """A class of the script. made: how an instance is made where the class says nothing: "" or "dataclass", "tuple";
    hints: what gives the types of its fields."""

    name: str
    bases: list[Value]
    vars: dict[str, Value]
    made: str = ""
    fields: list[tuple[str, Callable[[], Value] | None]] = field(default_factory=list)
    hints: dict[str, Callable[[], Value]] = field(default_factory=dict)

    def line(self) -> Iterator[Class]:
        """This class and those it inherits from, each once, nearest first."""
        yield self
        for base in self.bases:
            if isinstance(base, Class):
                yield from base.line()

    def all_fields(self) -> dict[str, Callable[[], Value] | None]:
        """A dataclass's or named tuple's fields with what gives their defaults, those it inherits first."""
        return {name: default for each in reversed(list(self.line())) for name, default in each.fields}

    def find(self, name: str) -> Value:
        for each in self.line():
            if name in each.vars:
                return each.vars[name]
        return None

    def after(self, owner: Class, name: str) -> Value:
        """What super() of `owner` finds."""
        line = list(self.line())
        for each in line[line.index(owner) + 1 :] if owner in line else []:
            if name in each.vars:
                return each.vars[name]
        return None

    @property
    def foreign(self) -> list[Lib]:
        """The libraries' classes that it inherits from."""
        return [base for each in self.line() for base in each.bases if isinstance(base, Lib)]

    @property
    def members(self) -> dict[str, Value]:
        """Of an Enum its members, each of them the value that it stands for; of all else none."""
        if not any(base.path.startswith("enum.") for base in self.foreign):
            return {}
        said = {name: value for name, value in self.vars.items() if isinstance(value, (int, float, str, Unknown))}
        plain = {name: value for name, value in said.items() if not name.startswith("_")}
        return {name: n if isinstance(value, Unknown) else value for n, (name, value) in enumerate(plain.items(), 1)}

    @property
    def is_module(self) -> bool:
        return any(base.path.endswith("Module") for base in self.foreign)


@dataclass(eq=False)
class Obj:
    """An instance of a class of the script."""

    kind: Class
    vars: dict[str, Value] = field(default_factory=dict)


@dataclass(eq=False)
class Bound:
    """A method with its object: of the script (`what` is a Func), or a name of an Array, Sum or instance."""

    me: Value
    what: Value
    call: Callable[..., Value]

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        return self.call(self, args, kwargs)


@dataclass(eq=False)
class Wrapped:
    """property, staticmethod, classmethod. kind: which."""

    kind: str
    func: Value


@dataclass(eq=False)
class Super:
    owner: Class
    me: Value


def known(value: Value) -> bool:
    return not isinstance(value, Unknown)


def mixed(*values: Value) -> Unknown:
    """Unknown, made of these: a model's where one of them is."""
    return NET if any(isinstance(value, Unknown) and value.net for value in values) else UNKNOWN
