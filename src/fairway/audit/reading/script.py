"""A script as text and tree, with the texts that it executes in its turn."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

How: TypeAlias = Literal["exec", "import", "run"]
"""exec: in place; import: as a module of its own; run: as a program of its own (runpy, python X)."""


@dataclass(frozen=True)
class Gap:
    """What could not be read: a text that does not parse, or code that is executed and stays unknown. line: from 1."""

    line: int
    why: str


@dataclass(frozen=True)
class Layer:
    """A text that a script executes: where it does (line and column as in `ast`), how, and the text.

    source: the file of the folder that the text was unpacked from, where that is not the script itself
    """

    line: int
    column: int
    how: How
    script: "Script"
    source: str = ""


@dataclass(frozen=True)
class Script:
    """One readable text of a submission.

    path: relative to the submission's folder; what was unpacked out of a script is `train_gpt.py!inner`
    tree: None where `unreadable` says why
    layers: what it executes or imports of its folder and of itself, in the order of the text; a circle is cut
    opaque: what it executes and nobody can read
    lines: for a notebook, the line of the .ipynb file that each line of `text` stands in; else empty
    """

    path: str
    text: str
    tree: ast.Module | None
    unreadable: Gap | None = None
    layers: tuple[Layer, ...] = ()
    opaque: tuple[Gap, ...] = ()
    lines: tuple[int, ...] = ()

    def line(self, line: int) -> int:
        """The line of the file that a line of `text` stands in."""
        return self.lines[line - 1] if 0 < line <= len(self.lines) else line

    def all(self) -> Iterator["Script"]:
        """This script and everything below it, each once."""
        seen: set[str] = set()
        waiting = [self]
        while waiting:
            script = waiting.pop(0)
            if script.path not in seen:
                seen.add(script.path)
                yield script
                waiting += [layer.script for layer in script.layers]
