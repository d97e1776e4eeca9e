"""Where windows are planned: the line that puts several numbers together for each of them, and hands them on."""

from __future__ import annotations

import ast
from collections import deque
from functools import lru_cache

import numpy as np

from fairway.audit.reading.tree import nodes
from fairway.audit.trial.arrays import Array
from fairway.audit.trial.values import Obj, Value

_FAR = 2_000  # tokens: numbers that stay below are of pieces, rows and ranks
_FEWEST = 16  # windows: fewer are documents, or shares of processes
_KEPT = 64  # windows
_MOST = 0.75  # of the windows: documents begin anew


@lru_cache(maxsize=8)
def handed_on(tree: ast.AST) -> frozenset[int]:
    """The ids of expressions that are added to a list, yielded, returned, or make the elements of one."""
    found: set[int] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
            found.update(id(arg) for arg in node.args)
        elif isinstance(node, (ast.Yield, ast.Return)):
            found.add(id(node.value))
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            found.add(id(node.elt))
    return frozenset(found)


class Plans:
    """How often several numbers were handed on in a line: over all, and between the last two numbers that were told;
    and of each line the numbers themselves, the last of them."""

    def __init__(self) -> None:
        self.times: dict[int, int] = {}
        self.recent: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.numbers: dict[int, deque[tuple[int, ...]]] = {}

    def met(self, line: int, value: Value) -> None:
        parts = tuple(value if isinstance(value, tuple) else value.vars.values() if isinstance(value, Obj) else ())
        numbers = tuple(part for part in parts if type(part) is int)
        cut = [part for part in parts if isinstance(part, Array) and part.pos is not None]
        if len(numbers) + len(cut) > 1 and numbers and (cut or max(numbers) >= _FAR):
            self.numbers.setdefault(line, deque(maxlen=_KEPT)).append(numbers)
            for times in (self.times, self.recent):
                times[line] = times.get(line, 0) + 1

    def told(self) -> None:
        if self.recent:
            self.last, self.recent = self.recent, {}

    @property
    def line(self) -> int:
        """The line in which most windows are put together, for the number told last or for any; 0 where few are."""
        return max(self._lines(), key=lambda each: each[1], default=(0, 0))[0]

    @property
    def overlapping(self) -> int:
        """The first line that plans as many windows as any does and more than once what they share; 0 where each of
        these lines plans every target once, or none does."""
        lines = self._lines()
        most = max((times for _, times in lines), default=0)
        many = (line for line, times in lines if 2 * times >= most)
        return next((line for line in many if not _tiled(list(self.numbers[line]))), 0)

    def _lines(self) -> list[tuple[int, int]]:
        """(line, times), in the order in which they were met."""
        for times in (self.last, self.times):
            found = [(line, each) for line, each in times.items() if each >= _FEWEST]
            if found:
                return found
        return []


def _tiled(windows: list[tuple[int, ...]]) -> bool:
    """Whether what a window says of its end is what the next one says of its beginning: (start, end, first) by one of
    its numbers, (start, length, first) by the sum of one and of a length, which does not move on as places do. Rows of
    documents that are gone through side by side say the same one after another."""
    windows = [each for each, before in zip(windows, [None, *windows], strict=False) if each != before]
    if len(windows) < 2:
        return False  # all alike
    width = min(map(len, windows))
    edges = [np.array([each[:width] for each in windows], dtype=np.int64)[:, part] for part in range(width)]
    lengths = [edge for edge in edges if (np.diff(edge) == 0).mean() >= _MOST]
    edges += [edge + length for edge in edges for length in lengths if edge is not length]
    ends = [edge for edge in edges if (np.diff(edge) > 0).mean() >= _MOST]
    return any(((begin[1:] == end[:-1]) & (begin[1:] < end[1:])).mean() >= _MOST for end in ends for begin in edges)


__all__ = ["Plans", "handed_on"]
