"""What the compiler asks of the machine that it compiles for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from fairway.audit.trial.arrays import Array
from fairway.audit.trial.limits import Limits
from fairway.audit.trial.planning import Plans
from fairway.audit.trial.values import Frame, Value

Compute = Callable[[Frame], Value]


class Host(Protocol):
    """What expressions ask of the machine."""

    limits: Limits
    looped: set[int]  # the ids of nodes that stand in loops
    plans: Plans
    handed_on: set[int]  # the ids of nodes whose values a list or a caller is given

    def step(self, line: int = 0) -> None: ...
    def doubt(self, line: int) -> None: ...
    def cut(self, whole: Value, size: Value) -> None: ...
    def weigh(self, array: Array) -> None: ...
    def truth(self, value: Value) -> bool: ...
    def items(self, value: Value) -> Iterator[Value]: ...
    def call(self, func: Value, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value: ...
    def attribute(self, value: Value, name: str) -> Value: ...
    def item(self, value: Value, index: Value) -> Value: ...
    def name(self, frame: Frame, name: str) -> Value: ...
    def shown(self, value: Value, line: int) -> None: ...


__all__ = ["Compute", "Host"]
