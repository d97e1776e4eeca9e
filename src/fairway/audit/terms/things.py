"""What a script's names stand for while it is read: functions, classes, objects, and the frames that hold names."""

import ast
from dataclasses import dataclass, field
from typing import Any

from fairway.audit.terms.term import Term

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(eq=False)
class Frame:
    """The names of one call, one class body or one module. depth: conditions that held when it began."""

    file: str
    outer: "Frame | None" = None
    vars: dict[str, Term] = field(default_factory=dict)
    depth: int = 0
    returns: list[tuple[Term | None, Term]] = field(default_factory=list)  # condition (None: always), value
    yields: list[Term] = field(default_factory=list)
    loops: list["Loop"] = field(default_factory=list)
    elsewhere: dict[str, "Frame"] = field(default_factory=dict)  # global and nonlocal names
    sent: Term | None = None  # what `yield` answers: of a coroutine that is sent something

    @property
    def module(self) -> "Frame":
        frame = self
        while frame.outer is not None:
            frame = frame.outer
        return frame


@dataclass(eq=False)
class Loop:
    """Where `continue` and `break` leave the names as they stood: (condition, names)."""

    depth: int
    continued: list[tuple[Term | None, dict[str, Term]]] = field(default_factory=list)
    broken: list[tuple[Term | None, dict[str, Term]]] = field(default_factory=list)


@dataclass(eq=False)
class Function:
    node: FunctionNode
    frame: Frame  # where it was defined
    defaults: dict[str, Term]
    owner: "Class | None" = None
    static: bool = False
    bound_class: bool = False
    computed: bool = False  # a property
    given: tuple[tuple[Term, ...], tuple[tuple[str, Term], ...]] = ((), ())  # functools.partial
    attrs: dict[str, Term] = field(default_factory=dict)  # names that were set on it

    @property
    def name(self) -> str:
        return getattr(self.node, "name", "lambda")


@dataclass(eq=False)
class Class:
    name: str
    vars: dict[str, Term]
    bases: tuple["Class", ...] = ()
    outside: tuple[str, ...] = ()  # bases that are not the script's own
    fields: tuple[str, ...] = ()  # annotated names, in order

    def find(self, name: str) -> Term | None:
        """A name of the class or of its own bases."""
        if name in self.vars:
            return self.vars[name]
        return next((found for base in self.bases if (found := base.find(name)) is not None), None)

    def all_fields(self) -> tuple[str, ...]:
        return tuple(name for base in self.bases for name in base.all_fields()) + self.fields


@dataclass(eq=False)
class Instance:
    kind: Class
    attrs: dict[str, Term] = field(default_factory=dict)
    depth: int = 0  # conditions that held when it was made
    order: int = 0  # events recorded before it was made
    held: Term | None = None  # what lies in it, where its class derives from a container: class Registry(dict)


@dataclass(frozen=True, eq=False)
class Bound:
    function: Function
    owner: Term


@dataclass(frozen=True, eq=False)
class Coroutine:
    """A generator that was begun: its function and what it was called with."""

    function: Function
    positional: tuple[Term, ...]
    named: tuple[tuple[str, Term], ...]


@dataclass(frozen=True, eq=False)
class Event:
    """A call of something that is not the script's own, in the order in which the script is read.

    term: the call; conditions: those that could not be decided and under which it happens; path: the names of the
    script's functions being executed, outermost first; loops: how many of them it stands in.
    """

    term: Term
    conditions: tuple[Term, ...]
    path: tuple[str, ...]
    loops: int
    order: int = 0
    within: int = 0  # how many names of `path` lead to the function that holds the innermost loop


def constant(value: Any, file: str = "", line: int = 0) -> Term:
    return Term("const", (), value, file, line)
