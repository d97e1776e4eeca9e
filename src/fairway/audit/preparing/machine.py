"""A preparation, tried: a script cuts documents of our own into tokens, and what it writes is kept."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from fairway.audit.preparing.asking import Asked
from fairway.audit.preparing.disk import Disk
from fairway.audit.preparing.functions import FUNCTIONS
from fairway.audit.preparing.pieces import Cutter, cutter_for
from fairway.audit.subcommands import INSTEAD
from fairway.audit.terms.data import TOKENISERS
from fairway.audit.trial import files
from fairway.audit.trial.arrays import Array
from fairway.audit.trial.files import text_of
from fairway.audit.trial.host import Compute
from fairway.audit.trial.limits import Forced
from fairway.audit.trial.machine import Compiler, Machine, over
from fairway.audit.trial.text import LENGTH
from fairway.audit.trial.values import Func, Lib, Spent, Value

_GIVEN, _MOST = 2, 8  # words behind a script's name: where it reads and where it writes; at most
_ARGV = re.compile(r"\bargv\[(\d+)(?::(\d+))?\]")
_BOUND = re.compile(r"^[ \t]*([\w, ]+)=[ \t]*(?:sys\.)?argv[ \t]*$", re.MULTILINE)
_STEPS = 200_000  # those of the corpus that come to their end take 70,000 at most


class Asking(Compiler):
    """A script that asks whether it is to prepare the data, `cfg["stage"] == "prep"`, is told so."""

    def __init__(self, host: Machine, words: tuple[str, ...]) -> None:
        super().__init__(host)
        self.words = words

    def _name(self, node: ast.Name) -> Compute:
        return super()._name(node) if not hasattr(node, INSTEAD) else self.compiled(getattr(node, INSTEAD))

    def _compare(self, node: ast.Compare) -> Compute:
        sides = [each.value for each in (node.left, *node.comparators) if isinstance(each, ast.Constant)]
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq) and any(side in self.words for side in sides):
            return lambda frame: True
        return super()._compare(node)


class Preparer(Machine):
    """lengths: by line, how long the bytes are whose length was asked for there; merged: by line, how often a change
    of a text made two texts one."""

    most_steps = _STEPS
    least_cut = 1 << 60

    def __init__(self, asked: Asked, forced: tuple[Forced, ...] = ()) -> None:
        super().__init__(asked.script, asked.settings, forced)
        self.words = asked.words
        text = "\n".join(script.text for script in asked.script.all())
        self.disk = Disk(text)
        self.cutter = cutter_for(self.vocabulary, text)
        self.lengths: dict[int, list[int]] = defaultdict(list)
        self.merged: dict[int, int] = defaultdict(int)
        self.came: dict[tuple[int, Value], str] = {}
        self.cut_at_line = 0
        self.functions = {**self.functions, **FUNCTIONS}
        self.compiler = Asking(self, self.words)

    def aimless(self, since: Any) -> bool:
        return False

    def attribute(self, value: Value, name: str) -> Value:
        if isinstance(value, Lib) and f"{value.path}.{name}" == "sys.argv":
            between = ["made/tokenizer.model"] * (_expected(self.script.text) - len(self.words) - _GIVEN)
            return [self.entry.path, *self.words, "made/documents", *between, "made/out"]
        if isinstance(value, Cutter) and name in TOKENISERS:
            self.cut_at_line = self.line
        return super().attribute(value, name)

    def of_module(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        raise Spent  # a model is asked: this is the training, and no preparation

    def foreign(self, func: Lib, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        of_text = func.path.startswith("str.") and func.path not in self.functions
        if of_text and args and isinstance(args[0], str):  # str.casefold, handed on
            return self.call(self.attribute(args[0], func.name), args[1:], kwargs, line)
        return super().foreign(func, args, kwargs, line)

    def native(self, func: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        found = super().native(func, args, kwargs)
        whole = getattr(func, "__self__", None)
        if isinstance(whole, (str, bytes)):
            self.changed(whole, found)
        return found

    def changed(self, text: str | bytes, found: Value) -> None:
        """A text became another, or parts."""
        plain = text.decode(errors="replace") if isinstance(text, bytes) else text
        key: Value = tuple(found) if isinstance(found, list) else found
        if not isinstance(key, (str, bytes, tuple)) or not all(isinstance(each, (str, bytes, int)) for each in key):
            return
        before = self.came.setdefault((self.line, key), plain)
        if before != plain:
            self.merged[self.line] += max(len(plain), len(before))

    def of_array(self, name: str, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        array = args[0] if args else None
        if name in ("tobytes", "tofile") and isinstance(array, Array) and array.num is not None:
            packed = array.num.tobytes()
            if name == "tobytes":
                return packed
            self.write(args[1], packed)
            return None
        return super().of_array(name, args, kwargs)

    def write(self, where: Value, packed: bytes) -> None:
        write = getattr(where, "write", None)
        path = text_of(where)
        if path is not None:
            self.disk.written[path] = packed
        elif write is not None:
            write(packed)


def _expected(text: str) -> int:
    """How many words behind its name a script goes through: sys.argv[3], sys.argv[1:4], `_, a, b, c = sys.argv`."""
    read = (int(last or first) - (1 if last else 0) for first, last in _ARGV.findall(text))
    bound = (names.count(",") for names in _BOUND.findall(text))
    return min(max((*read, *bound), default=0), _MOST)


def prepared(asked: Asked, forced: tuple[Forced, ...] = ()) -> Preparer:
    """The machine after the script's last line. It never raises on what the script holds. forced: numbers of the script
    that are taken for others."""
    machine = Preparer(asked, forced)
    room = files.room.set(machine.disk)
    try:
        return over(lambda forced: machine, LENGTH, ())
    finally:
        files.room.reset(room)


__all__ = ["Preparer", "prepared"]
