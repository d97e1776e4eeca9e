"""run: a script from its first line to its last, on abstract values."""

from __future__ import annotations

import ast
import sys
from typing import Any

from fairway.audit.flow.contexts import Contexts
from fairway.audit.flow.core import FUEL, Frame, OutOfFuel
from fairway.audit.flow.events import Trace, Unknown
from fairway.audit.flow.values import NOTHING, Value
from fairway.audit.reading.script import Layer, Script
from fairway.audit.reading.tree import nodes
from fairway.audit.settings import Settings
from fairway.audit.verdict import Place

_STACK = 12_000  # Python frames; a call of the script takes about ten


class Machine(Contexts):
    """The interpreter, with the texts that a script executes and imports."""

    def __init__(self, script: Script, settings: Settings, fuel: int = FUEL) -> None:
        super().__init__(script, settings, fuel)
        self.modules: dict[str, Value] = {}
        self.ran: set[int] = set()

    def run(self) -> Trace:
        """Walk the script."""
        try:
            self.program(self.entry)
        except OutOfFuel:
            pass
        except RecursionError:
            self.trace.complete = False
            place = Place(self.entry.path)
            why = "the script is nested too deeply"
            self.trace.events.append(Unknown(len(self.trace.events), place, (place,), (), why=why))
        return self.trace

    def program(self, script: Script) -> None:
        """A script as the main program; then what it runs as programs of their own."""
        if script.tree is None:
            return
        self.module(script, "__main__")
        for layer in script.layers:
            if id(layer) not in self.ran and layer.how in ("run", "exec"):
                self.ran.add(id(layer))
                self.program(layer.script)

    def module(self, script: Script, name: str) -> Value:
        """Walk a module's body."""
        obj = self.heap.new("module", name)
        obj.slots["__name__"] = Value(const=name)
        obj.slots["__file__"] = Value(const=script.path)
        value = self.ref(obj)
        if name != "__main__":
            self.modules[name] = value
        if script.tree is not None:
            self._body(script, script.tree.body, Frame(obj, script, obj))
        return value

    def _body(self, script: Script, body: list[ast.stmt], frame: Frame) -> None:
        self.frames.append(frame)
        try:
            self.block(body)
        finally:
            self.frames.pop()

    def layer_at(self, node: Any, how: tuple[str, ...]) -> Layer | None:
        """The text that is executed at a call, where it could be read."""
        script = self.frame.script
        line, column = getattr(node, "lineno", 0), getattr(node, "col_offset", -1)
        for layer in script.layers:
            if layer.how in how and layer.line == line and layer.column in (column, 0, -1):
                return layer
        return next((layer for layer in script.layers if layer.how in how and layer.line == line), None)

    def run_text(self, args: list[Value], node: ast.AST | None) -> Value:
        """exec(text): walked where it stands."""
        layer = self.layer_at(node, ("exec",))
        if layer is not None and layer.script.tree is not None:
            self.ran.add(id(layer))
            frame = self.frame
            scope = frame.globals
            self._body(layer.script, layer.script.tree.body, Frame(scope, layer.script, scope))
            return NOTHING
        if args and isinstance(args[0].const, str):
            try:
                tree = ast.parse(args[0].const)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                tree = None
            if tree is not None and len(args[0].const) < 200_000:
                frame = self.frame
                inner = Frame(frame.obj, frame.script, frame.globals, frame.closure, frame.node, line=frame.line)
                for each in nodes(tree):
                    if hasattr(each, "lineno"):
                        each.lineno = frame.line
                self.frames.append(inner)
                try:
                    last = tree.body[-1] if len(tree.body) == 1 else None
                    if isinstance(last, ast.Expr):
                        return self.evaluate(last.value)
                    self.block(tree.body)
                finally:
                    self.frames.pop()
                return NOTHING
        self.unknown(node, "code that is executed and cannot be read")
        return NOTHING

    def imported(self, name: str, node: ast.AST) -> Value | None:
        """A module of the submission itself; None for any other."""
        if name in self.modules:
            return self.modules[name]
        stem = name.rsplit(".", 1)[-1]
        for layer in self.frame.script.layers:
            path = layer.script.path.rsplit("!", 1)[-1]
            if layer.how == "import" and path.rsplit("/", 1)[-1].removesuffix(".py") == stem:
                self.ran.add(id(layer))
                return self.module(layer.script, name)
        return None


def run(script: Script, settings: Settings, fuel: int = FUEL) -> Trace:
    """The trace of a script. It never raises on what a script holds; what is not followed is an Unknown."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _STACK))
    try:
        return Machine(script, settings, fuel).run()
    finally:
        sys.setrecursionlimit(before)
