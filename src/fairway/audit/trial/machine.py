"""run: a script from its first line to its last, over a short text of our own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from fairway.audit.reading.kernels import operators, priced
from fairway.audit.reading.script import Layer, Script
from fairway.audit.settings import Settings
from fairway.audit.trial import arguments, files, text
from fairway.audit.trial.acting import Act
from fairway.audit.trial.calls import Calls, Decorator
from fairway.audit.trial.core import Core
from fairway.audit.trial.functions import functions
from fairway.audit.trial.generators import Generators
from fairway.audit.trial.limits import CHUNK, Coarse, Forced, Limits, alone, finer, looped
from fairway.audit.trial.named import numbers, taken, widths
from fairway.audit.trial.planning import handed_on
from fairway.audit.trial.told import Trial
from fairway.audit.trial.turns import shorter
from fairway.audit.trial.values import UNKNOWN, Class, Frame, Func, Lib, Obj, Raised, Spent, Value

_STACK = 20_000  # Python frames; a call of the script takes about twenty
_NATIVE = re.compile(r"\bnumba\b")
_CHUNKS = "chunk|segment|span|region|(?:eval|ttt|score|adapt)_block|block_tokens"  # names of what the text is cut into
_LONG = "it is too long for a trial"
_MODULE = Class("module", [], {})


def _untried(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """@njit, @njit(nogil=True): a function of which nobody knows what it gives."""
    kernel: Value = lambda *_args, **_kwargs: UNKNOWN  # noqa: E731
    return kernel if args and isinstance(args[0], Func) else Decorator(lambda value: kernel)


_UNTRIED: dict[str, Act] = {f"numba.{name}": _untried for name in ("njit", "jit")}


class Compiler(Generators):
    """Trees into closures, for one machine."""

    def __init__(self, host: Machine) -> None:
        self.host = host


class Machine(Calls):
    """All parts together."""

    def __init__(
        self,
        script: Script,
        settings: Settings,
        forced: tuple[Forced, ...] = (),
        slow: float = 0.0,
        native: bool = True,
    ) -> None:
        """native: whether kernels that numba compiles are worked out; else nobody knows what they give."""
        super().__init__(script, settings, forced, slow)
        self.compiler = Compiler(self)
        self.functions = functions() if native else {**functions(), **_UNTRIED}
        self.trial.native = native

    def run(self) -> Trial:
        self.trial.length = text.length.get()
        try:
            self.module(self.entry, "__main__")
            self.trial.complete = True
        except Spent:
            self.trial.why = _LONG
        except Raised as error:
            self.trial.complete = error.kind == "SystemExit"
            self.trial.why = f"line {self.line} raises {error.kind} ({error.value})"
        except RecursionError:
            self.trial.why = "it is nested too deeply"
        except MemoryError:
            self.trial.why = "its arrays are too large for a trial"
        self._forget()
        return self.trial

    def _forget(self) -> None:
        """Lets go of what the script has made: a machine is kept for what it says of a run, and a name that holds a
        function whose scope holds the name would keep all of it until somebody looks for such circles."""
        for made in self.modules.values():
            made.vars.clear()
        self.models.clear()
        self.forms.clear()

    def module(self, script: Script, name: str) -> Value:
        """A module's body; an object that has its names."""
        frame = Frame(None)
        frame.vars.update({"__name__": name, "__file__": script.path, "__doc__": None})
        made = Obj(_MODULE, frame.vars)
        self.modules[name] = made
        self.body(script, frame)
        return made

    def body(self, script: Script, frame: Frame) -> None:
        if script.tree is None:
            return
        self.looped |= looped(script.tree)
        self.handed_on |= handed_on(script.tree)
        self.widths |= widths(script.tree)
        self.kernels |= priced(script.tree)
        self.operators |= operators(script.tree)
        before, self.script = self.script, script
        try:
            self.compiler.block(script.tree.body)(frame)
        finally:
            self.script = before

    def layer(self, how: tuple[str, ...], fits: Callable[[Layer], bool]) -> Layer | None:
        return next((each for each in self.entry.layers if each.how in how and fits(each)), None)

    def imported(self, name: str, line: int) -> Value:
        """A module of the submission itself, or a library."""
        if name in self.modules:
            return self.modules[name]
        stem = name.rsplit(".", 1)[-1]
        layer = self.layer(("import",), lambda each: each.script.path.rsplit("/", 1)[-1].endswith(f"{stem}.py"))
        return self.module(layer.script, name) if layer is not None else Lib(name)


_ROWS = 16  # windows or documents side by side: the shorter text has no more
_PAIR = 2
_BATCHES = range(_ROWS + 1, 513)  # of them; more are tokens

Kind = TypeVar("Kind", bound=Machine)


def run(
    script: Script,
    settings: Settings,
    length: int = text.LENGTH,
    forced: tuple[Forced, ...] = (),
    cut: bool = True,
    native: bool = True,
    group: tuple[int, int] = (0, 1),
) -> Trial:
    """The trial of a script. It never raises on what a script holds. length: tokens of the text; forced: numbers of
    the script that are taken for others; cut: whether chunks that are larger than the text are taken for smaller ones;
    native: whether kernels are tried that an earlier trial of the script may have found too much; group: the rank of
    the process, and how many there are.
    Where a loop goes through the tokens one by one and takes too many steps for that, the text is a shorter one; so it
    is where the script does much with each batch, and batches have fewer rows then. Where even that is too much for a
    kernel that numba compiles, nothing is known of what such kernels give; a number that cuts the text into one piece
    is taken for a smaller one."""
    alone = arguments.group.set(group)
    try:
        return _run(script, settings, length, forced, cut, native)
    finally:
        arguments.group.reset(alone)


def _run(script: Script, settings: Settings, length: int, forced: tuple[Forced, ...], cut: bool, native: bool) -> Trial:
    begin = partial(Machine, script, settings, native=native)
    trial = over(begin, length, (*forced, *_named(script, settings, length, forced)) if cut else forced).trial
    if native and not (trial.complete or (trial.slow and shorter(trial.slow))) and _NATIVE.search(script.text):
        begin = partial(Machine, script, settings, native=False)
        trial = over(begin, length, trial.limits.forced).trial
    less = shorter(trial.slow) if trial.slow else text.SHORT if trial.why == _LONG else 0
    if less and (less < length or trial.slow):  # a text that is short already may have been called too long as well
        begin, length = partial(begin, slow=trial.slow), min(less, length)
        fewer = () if trial.slow else taken(script, settings, ("batch",), _BATCHES, _ROWS)
        chunks = _named(script, settings, length, trial.limits.forced) if cut else []
        trial = over(begin, length, (*trial.limits.forced, *fewer, *chunks)).trial
    while cut and (number := _too_large(trial, script, length)):
        trial = over(begin, length, (*trial.limits.forced, finer(number, length))).trial
    return trial


def in_pairs(trial: Trial, script: Script, settings: Settings) -> Trial:
    """The same trial with batches of two, where it came to its end and nothing learned: of a chunk that is a part of
    the short text no batch of thirty-two windows can be made. The first one where that shows no more."""
    fewer = tuple(taken(script, settings, ("batch",), range(_PAIR + 1, _BATCHES.stop), _PAIR))
    if not fewer or not trial.complete or trial.lessons:
        return trial
    again = over(partial(Machine, script, settings, native=trial.native), trial.length, (*trial.limits.forced, *fewer))
    return again.trial if again.trial.complete and again.trial.lessons else trial


def _named(script: Script, settings: Settings, length: int, forced: tuple[Forced, ...]) -> list[Forced]:
    """Tokens of chunks, as their names say, of which the short text is a part of one: each is known before the trial,
    and would begin it anew after it."""
    numbered = sorted(each for each in numbers(_CHUNKS, script, settings.environment) if length < each <= CHUNK)
    found: list[Forced] = []
    for number in numbered:
        if Limits((*forced, *found)).fresh(number) and alone(script.tree, number):
            found.append(finer(number, length))
    return found


def _too_large(trial: Trial, script: Script, length: int) -> int | None:
    """Tokens of chunks that no name tells, of which the short text is a part of one."""
    found = trial.limits.cutting(length)
    return found if found and alone(script.tree, found) else None


def over(begin: Callable[..., Kind], length: int, forced: tuple[Forced, ...]) -> Kind:
    """The machine that came to the end of a text of so many tokens. begin: makes one, given `forced`."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _STACK))
    whole = text.length.set(length)
    try:
        while True:
            empty = files.disc.set({})
            try:
                machine = begin(forced=forced)
                with np.errstate(all="ignore"):
                    machine.run()
                return machine
            except Coarse as found:
                forced = (*forced, finer(found.number, length))
            finally:
                files.disc.reset(empty)
    finally:
        text.length.reset(whole)
        sys.setrecursionlimit(before)


__all__ = ["Machine", "over", "run"]
