"""Where windows are planned: the line that puts several numbers together for each of them, and hands them on."""

from __future__ import annotations

import ast

from fairway.audit.reading.tree import nodes
from fairway.audit.trial.arrays import Array
from fairway.audit.trial.values import Obj, Value

_FAR = 2_000  # tokens: numbers that stay below are of pieces, rows and ranks
_FEWEST = 16  # windows: fewer are documents, or shares of processes


def handed_on(tree: ast.AST) -> set[int]:
    """The ids of expressions that are added to a list, yielded, returned, or make the elements of one."""
    found: set[int] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
            found.update(id(arg) for arg in node.args)
        elif isinstance(node, (ast.Yield, ast.Return)):
            found.add(id(node.value))
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            found.add(id(node.elt))
    return found


class Plans:
    """How often several numbers were handed on in a line: over all, and between the last two numbers that were told."""

    def __init__(self) -> None:
        self.times: dict[int, int] = {}
        self.recent: dict[int, int] = {}
        self.last: dict[int, int] = {}

    def met(self, line: int, value: Value) -> None:
        parts = tuple(value if isinstance(value, tuple) else value.vars.values() if isinstance(value, Obj) else ())
        numbers = [part for part in parts if type(part) is int]
        cut = [part for part in parts if isinstance(part, Array) and part.pos is not None]
        if len(numbers) + len(cut) > 1 and numbers and (cut or max(numbers) >= _FAR):
            for times in (self.times, self.recent):
                times[line] = times.get(line, 0) + 1

    def told(self) -> None:
        if self.recent:
            self.last, self.recent = self.recent, {}

    @property
    def line(self) -> int:
        """The line in which most windows are put together, for the number told last or for any; 0 where few are."""
        for times in (self.last, self.times):
            line = max(times, key=times.__getitem__, default=0)
            if times.get(line, 0) >= _FEWEST:
                return line
        return 0


__all__ = ["Plans", "handed_on"]
