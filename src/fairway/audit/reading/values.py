"""What a constant expression may be: plain values, and stand-ins for what only a running script would have."""

import ast
from dataclasses import dataclass, field
from typing import Any


class Unknown:
    """A value that the text alone does not give."""

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = Unknown()


@dataclass(frozen=True)
class Name:
    """A module or a function of the standard library by its dotted name: `base64`, `base64.b85decode`."""

    dotted: str


@dataclass(frozen=True, eq=False)
class Closure:
    """A function of the script; scope: the names it was made among."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    scope: "Scope"


@dataclass(frozen=True)
class Method:
    """A method of a plain value, not yet called."""

    owner: Any
    name: str


@dataclass(frozen=True)
class Code:
    """The result of compile(): still a text."""

    text: str


@dataclass(frozen=True)
class Where:
    """A pathlib path."""

    path: str


@dataclass(eq=False)
class Held:
    """An open file, a BytesIO or a temporary file; content: what it reads, or None."""

    path: str
    content: Any = None
    text: bool = True
    written: list[Any] = field(default_factory=list)

    def kept(self) -> None:
        """Called when something was written."""


@dataclass(frozen=True, eq=False)
class Space:
    """A module of the submission, or a class: names that can be reached with a dot."""

    scope: "Scope"


@dataclass(eq=False)
class Scope:
    """Names and their values; a function's scope looks further in the one it was made among."""

    names: dict[str, Any] = field(default_factory=dict)
    outer: "Scope | None" = None

    def get(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return None

    @property
    def module(self) -> "Scope":
        scope = self
        while scope.outer is not None:
            scope = scope.outer
        return scope
