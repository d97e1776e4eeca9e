"""The module `operator`: its functions give what the operators give, and its getters what lies under a name."""

from __future__ import annotations

from fairway.audit.trial.acting import Act
from fairway.audit.trial.core import Core
from fairway.audit.trial.operators import DUNDERS, combine
from fairway.audit.trial.values import Value


def _operator(kind: str) -> Act:
    return lambda machine, args, kwargs, line: combine(kind, *args)


def _attributes(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """attrgetter("loss"), attrgetter("a.b", "c")"""

    def get(value: Value) -> Value:
        found = []
        for path in args:
            held = value
            for name in path.split("."):
                held = machine.attribute(held, name)
            found.append(held)
        return found[0] if len(found) == 1 else tuple(found)

    return get


def _items(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """itemgetter(0), itemgetter("loss", "bytes")"""

    def get(value: Value) -> Value:
        found = tuple(machine.item(value, index) for index in args)
        return found[0] if len(found) == 1 else found

    return get


FUNCTIONS: dict[str, Act] = {
    **{f"operator.{name}": _operator(kind) for kind, name in DUNDERS.items()},
    "operator.attrgetter": _attributes,
    "operator.itemgetter": _items,
}


__all__ = ["FUNCTIONS"]
