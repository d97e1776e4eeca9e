"""A trial whose clock goes on: how long a training loop runs by the clock on the wall, whatever the script makes of it.

The script decides by its own arithmetic when its 600 s are over: pauses are taken off, a start is moved on, a share is
counted. Here its clock is ours. It goes on with everything that training is made of - a lesson, a read of the training
text, a message between the cards, a step of an optimiser, an average of the weights - and stands still else, so that a
look at the validation text on the way costs nothing, as is accepted. What a loop took from its first turn to its last
is then a number.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fairway.audit.case import Case
from fairway.audit.passes.late import LIMIT
from fairway.audit.passes.restarts import learning_loops, looks, milestones, short_helpers
from fairway.audit.reading.script import Script
from fairway.audit.reading.tree import nodes
from fairway.audit.settings import Settings
from fairway.audit.trial import text
from fairway.audit.trial.arrays import Array
from fairway.audit.trial.core import Core
from fairway.audit.trial.limits import Forced, site_of
from fairway.audit.trial.machine import Machine, over
from fairway.audit.trial.named import LARGEST, numbers, taken
from fairway.audit.trial.turns import Turns
from fairway.audit.trial.values import Lib, Spent, Unknown, Value
from fairway.audit.weighing.machine import Way

LESSON, READ, MESSAGE, STEP, AVERAGE = 0.5, 0.4, 0.1, 0.5, 0.8  # seconds: of a hundred turns rather than seven thousand
_LARGE = 10_000  # tokens: of the training text, and no table
_NUMBERS = 100_000  # of an array: a step
_LOOKS = 3  # at the clock, where the model learns: one ends the loop, one is said in the log
_TURNS = 600  # of a loop that no clock ends
_BATCH = 65_536  # tokens: reading larger ones row by row takes the steps
_ALIKE = 3  # turns of a loop of which all are alike: the rest of them takes as long for each
_FEW = 12  # turns that say too little
_LATEST = 20_000  # steps
_STEPS = 3  # of those at which something is done to the clock: each is tried by itself
_FAR = 100  # steps: fewer are gone through
_SHARE = 4  # of the turns, until something is done to the clock
_LESS = 0.7  # of the turns, where the clock ends them and goes twice as fast
_MOST = 0.9  # of what is lost
_SOME = 0.02  # of what a loop takes
_SELDOM = 8.5  # turns to a look: who asks less often is not seen to be ended by it
_OFTEN = 32  # turns: who asks less often than that may well be too late
FASTEST = 0.05  # of a step on the machine of the challenge: the records have 60 to 130 ms
_ROOM = 1.02  # of the limit, besides two turns: the clock is looked at between steps
_MESSAGES = frozenset(
    ("all_reduce", "all_gather", "reduce", "reduce_scatter", "all_gather_into_tensor", "reduce_scatter_tensor")
)
_AVERAGING = frozenset(("lerp_", "mul_", "_foreach_lerp_", "_foreach_mul_", "clip_grad_norm_"))


@dataclass
class Loop:
    """A loop that trains. begun: when it began; now: at the end of its last turn; lessons, looks: how many there had
    been when it began; timed: turns in which the clock was looked at; listed: among those that train."""

    line: int
    begun: float
    now: float
    lessons: int
    looks: int
    turns: int = 0
    timed: int = 0
    listed: bool = False

    @property
    def asked(self) -> float:
        """Turns for each look at the clock."""
        return self.turns / max(1, self.timed)


@dataclass
class Interval:
    """Between two looks at the clock. first, second: the calls and the lines of these; since: when it was met for the
    first time; spent: seconds in all."""

    first: Way
    second: Way
    since: float
    spent: float = 0.0


@dataclass(frozen=True)
class Overrun:
    """seconds: what the training loop takes; line: where the time is lost; more: turns on top of those that the clock
    ends after so many seconds, where they are what is too long."""

    seconds: float
    loop: int
    line: int
    more: int = 0


@dataclass(frozen=True)
class After:
    """Of a loop that follows the one that the clock ends after `ended` seconds: its turns, and the seconds that they
    take at the least, or by the clock that it asks itself."""

    turns: int
    ended: float
    seconds: float


class Timer(Machine):
    """The trial's machine with a clock that goes on."""

    most_steps = 150_000
    idle_steps = 1_000  # of a loop that reads a batch row by row
    idle_again = 20

    def __init__(self, script: Script, settings: Settings, forced: tuple[Forced, ...] = (), rate: float = 1.0) -> None:
        super().__init__(script, settings, forced)
        self.rate = rate
        for name in ("time", "perf_counter", "monotonic", "process_time"):
            self.functions[f"time.{name}"] = _look
        for name in ("time_ns", "perf_counter_ns", "monotonic_ns"):
            self.functions[f"time.{name}"] = _look_ns
        for name in ("numpy.memmap", "numpy.fromfile"):
            self.functions[name] = _read(self.functions[name])
        self.now = 0.0
        self.total = 0  # lessons
        self.done: set[tuple[int, int]] = set()  # lines that read and average, since the last lesson
        self.looks = 0  # at the clock
        self.whole = {
            node.lineno for node in nodes(script.tree) if isinstance(node, ast.For) and not _may_end_early(node)
        }
        self.running: dict[int, tuple[Turns, Loop]] = {}
        self.loops: list[Loop] = []
        self.looked: tuple[Way, float] = ((), 0.0)
        self.intervals: dict[tuple[Way, Way], Interval] = {}

    def spend(self, seconds: float) -> None:
        self.now += seconds * self.rate

    def read_clock(self) -> float:
        return self.look()

    def look(self) -> float:
        """The script asks its clock."""
        way = (*self.stack, self.line)
        first, then = self.looked
        if first and self.now > then and self.loops:
            key = (first, way)
            held = self.intervals.setdefault(key, Interval(first, way, then))
            held.spent += self.now - then
        self.looked = (way, self.now)
        self.clock += 1e-7
        self.looks += 1
        return self.now + self.clock

    def mark(self, over: Value = None) -> Turns:
        turns = super().mark(over)
        self.running[id(turns)] = (turns, Loop(self.line, self.now, self.now, self.total, self.looks))
        return turns

    def aimless(self, since: Turns) -> bool:
        _, loop = self.running[id(since)]
        learned = self.total - loop.lessons
        if not learned:
            return super().aimless(since)
        loop.turns += 1
        loop.timed += self.looks > loop.looks
        loop.now, loop.looks = self.now, self.looks
        if not loop.listed:
            loop.listed = True
            self.loops.append(loop)
        alike = loop.turns == _ALIKE < since.known and not loop.timed and loop.line in self.whole
        if alike and since.known > _TURNS:
            loop.turns = since.known  # what comes after it is not gone through either
        if loop.turns > _TURNS:
            raise Spent
        if alike:
            self._rest(loop, since.known)
        return alike

    def _rest(self, loop: Loop, turns: int) -> None:
        """The turns that are left of a loop that asks no clock: it is not gone through."""
        self.now += (turns / loop.turns - 1) * (self.now - loop.begun)
        self.total += (turns - loop.turns) * (self.total - loop.lessons) // loop.turns
        loop.turns, loop.now = turns, self.now

    def learn(self, value: Value) -> None:
        super().learn(value)
        self.total += 1
        self.spend(LESSON)

    def weigh(self, array: Array) -> None:
        self.trial.steps += array.body.size // _NUMBERS

    def item(self, value: Value, index: Value) -> Value:
        if isinstance(value, Array) and value.pos is None and value.num is not None and value.num.size > _LARGE:
            self.once(READ)
        return super().item(value, index)

    def foreign(self, func: Lib, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        if func.path.startswith("torch.distributed.") and func.name in _MESSAGES:
            self.spend(MESSAGE)
        if func.name in _AVERAGING:
            self.once(AVERAGE)
        return super().foreign(func, args, kwargs, line)

    def once(self, seconds: float) -> None:
        """A batch is read, weights are averaged, gradients clipped: all at once or one by one."""
        if (self.line, self.total) not in self.done:
            self.done = {each for each in self.done if each[1] == self.total} | {(self.line, self.total)}
            self.spend(seconds)

    def attribute(self, value: Value, name: str) -> Value:
        if name == "step" and isinstance(value, Unknown):
            self.spend(STEP)
        if name in _AVERAGING and isinstance(value, Unknown):
            self.once(AVERAGE)
        return super().attribute(value, name)


def _may_end_early(loop: ast.For) -> bool:
    """Whether something in a loop leaves it, or the function that it stands in."""
    return any(isinstance(each, (ast.Break, ast.Return)) for part in loop.body for each in nodes(part))


def _read(open_file: Callable[..., Value]) -> Callable[..., Value]:
    """A file of which nobody knows which one it is: a batch is read from it all the same."""

    def act(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        found = open_file(machine, args, kwargs, line)
        if isinstance(found, Unknown) and isinstance(machine, Timer):
            machine.once(READ)
        return found

    return act


def _look(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    assert isinstance(machine, Timer)
    return machine.look()


def _look_ns(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    assert isinstance(machine, Timer)
    return int(machine.look() * 1e9)


def timed(case: Case) -> Overrun | None:
    """The training loop that goes on for longer than the limit; None where it does not, or where none is ended by the
    clock: a loop that is takes half as many turns of twice the time."""
    if looks(case.body.tree) < _LOOKS and not _goes_on(case):
        return None
    found, turns = _timed(case, ())
    found = found or _far_ahead(case)
    sooner = dict(_sooner(case, turns // _SHARE)) if found is None and turns else {}
    for step, line in list(sooner.items())[:_STEPS]:
        late, _ = _timed(case, (step,))
        if late is not None:
            return replace(late, line=line)
    return found


def _timed(case: Case, forced: tuple[Forced, ...]) -> tuple[Overrun | None, int]:
    """With the turns of the loop, 0 where there is none."""
    machine, loop = _trained(case, forced)
    if loop is None:
        return None, 0
    seconds = loop.now - loop.begun
    asked = max(2, _every(case, loop.line), math.ceil(loop.asked))
    if seconds <= _ROOM * LIMIT + asked * seconds / loop.turns:
        return None, loop.turns
    slower = _trained(case, forced, rate=2.0)[1]
    if slower is None or slower.line != loop.line:
        return None, loop.turns
    ended = 2 * (loop.turns - slower.turns)  # of twice the time it takes half of those that the clock ends
    fixed = not forced and ended * seconds / loop.turns <= LIMIT  # what is set back at a step is as fixed
    if slower.turns > _LESS * loop.turns or fixed:
        return _longer(case, loop, ended), loop.turns
    return Overrun(seconds, loop.line, _lost(case, machine, loop)), loop.turns


def _longer(case: Case, loop: Loop, ended: int) -> Overrun | None:
    """Turns that a loop takes on top of those that the clock ends, however slow they are: more than what is left can
    hold."""
    step = (loop.now - loop.begun) / loop.turns
    more, limit = loop.turns - ended, _forgiven(ended * step, step)
    if ended < _FEW or limit > LIMIT or more * FASTEST <= LIMIT - limit:
        return None
    line = next((each.lineno for each in _moved_on(_inside(case, loop.line))), loop.line)
    return Overrun(limit, loop.line, line, more)


def _goes_on(case: Case) -> bool:
    """Whether a loop that takes a gradient may set itself an end that lies a number of steps ahead."""
    return any(True for _ in _ends_ahead(case))


def _ends_ahead(case: Case) -> Iterator[ast.Assign]:
    """Where loops that take a gradient set themselves an end that lies a number of steps ahead."""
    for each in learning_loops(case.body.tree):
        yield from _moved_on(nodes(each))


def _far_ahead(case: Case) -> Overrun | None:
    """An end that lies more steps ahead than a trial has turns: taken for a few, that shows when the clock ends it."""
    for end in _ends_ahead(case):
        assert isinstance(end.value, ast.BinOp)
        site = site_of(end.value.right)
        name = site[2] if site is not None else ""
        many = numbers(f"^{re.escape(name)}$", case.script, case.settings.environment) if name else set()
        for more in sorted(each for each in many if _FAR < each < _LATEST):
            loop = _trained(case, (Forced(None, more, _FEW, name.lower()),))[1]
            step = (loop.now - loop.begun) / loop.turns if loop is not None else 0.0
            limit = _forgiven((loop.turns - _FEW) * step, step) if loop is not None else LIMIT
            if loop is not None and limit < LIMIT < limit + more * FASTEST:
                return Overrun(limit, loop.line, end.lineno, more)
    return None


def _moved_on(inside: Sequence[ast.AST]) -> list[ast.Assign]:
    """Where a loop sets what it is held against to a sum: `stop_after = step + more`."""
    held = _held(inside)
    return [
        each
        for each in inside
        if isinstance(each, ast.Assign)
        and isinstance(each.value, ast.BinOp)
        and isinstance(each.value.op, ast.Add)
        and site_of(each.value.right) is not None
        and any(isinstance(target, ast.Name) and target.id in held for target in each.targets)
    ]


def _every(case: Case, line: int) -> int:
    """In how many turns a loop asks once whether to end: `if step % 8 == 0 and now >= cap: stop_after = step`. On the
    machine of the challenge so many steps take a second."""
    inside = _inside(case, line)
    held = _held(inside)
    found: set[int] = set()
    for test in (
        each for each in inside if isinstance(each, ast.If) and any(_ends(part, held) for part in nodes(each))
    ):
        for part in nodes(test.test):
            if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mod):
                site = site_of(part.right)
                if isinstance(part.right, ast.Constant) and type(part.right.value) is int:
                    found.add(part.right.value)
                elif site is not None:
                    found |= numbers(f"^{re.escape(site[2])}$", case.script, case.settings.environment)
    return max((each for each in found if each <= _OFTEN), default=0)


def _ends(node: ast.AST, held: set[str]) -> bool:
    """Whether a loop is left here, or what it is held against is set."""
    set_here = isinstance(node, ast.Assign) and any(getattr(target, "id", "") in held for target in node.targets)
    return set_here or isinstance(node, (ast.Break, ast.Return))


def _inside(case: Case, line: int) -> list[ast.AST]:
    """All that stands in the loop at a line."""
    loops = (each for each in nodes(case.body.tree) if isinstance(each, (ast.For, ast.While)) and each.lineno == line)
    return [part for loop in loops for part in nodes(loop)]


def _held(inside: Sequence[ast.AST]) -> set[str]:
    """The names in comparisons."""
    return {
        part.id
        for each in inside
        if isinstance(each, ast.Compare)
        for part in nodes(each)
        if isinstance(part, ast.Name)
    }


def steps_after(case: Case, line: int) -> After:
    """What the training loop at this line takes that begins when the one that the clock ends is over."""
    machine, loop = _trained(case)
    if loop is None:
        return After(0, 0.0, 0.0)
    ended = _forgiven(loop.now - loop.begun, (loop.now - loop.begun) / loop.turns)
    later = [each for each in machine.loops if each.line == line and each.begun >= loop.now]
    turns = max((each.turns for each in later), default=0)
    timed = [each for each in later if each.timed > 0.9 * each.turns]  # the step that crosses the line is forgiven
    spent = ((each.now - each.begun) * (1.0 - 1.0 / each.turns) for each in timed)
    return After(turns, ended, max(turns * FASTEST, *spent, 0.0) if later else 0.0)


def _forgiven(seconds: float, step: float) -> float:
    """What a loop took that the clock ends, where the step that crosses the line, long as it is here, is forgiven."""
    return seconds if not LIMIT <= seconds <= LIMIT + step else LIMIT - step


def _sooner(case: Case, soon: int) -> Iterator[tuple[Forced, int]]:
    """Steps at which something is done to the clock, after the turns that a trial has: taken for this one. With the
    line of what is done."""
    for node, line in milestones(case.body.tree):
        site = site_of(node)
        name = site[2] if site is not None else ""
        if name:
            for number in sorted(numbers(f"^{re.escape(name)}$", case.script, case.settings.environment)):
                if soon < number < _LATEST:
                    yield Forced(None, number, soon, name.lower()), line
        elif isinstance(node, ast.Constant) and type(node.value) is int and soon < node.value < _LATEST:
            yield Forced(site, node.value, soon), line


def _trained(case: Case, more: tuple[Forced, ...] = (), rate: float = 1.0) -> tuple[Timer, Loop | None]:
    """A trial of so many seconds for a second, and its longest loop that looks at the clock in its turns."""
    begin: Callable[..., Timer] = partial(Timer, case.script, case.settings, rate=rate)
    batches = taken(case.script, case.settings, ("batch_tokens", "step_tokens"), range(_BATCH + 1, LARGEST), _BATCH)
    machine = over(begin, text.SHORT, (*batches, *more))
    many = [each for each in machine.loops if _FEW <= each.turns < _TURNS]
    ended = [each for each in many if each.timed >= _FEW and each.asked <= _SELDOM]
    return machine, max(ended, key=lambda each: each.now - each.begun, default=None)


def _lost(case: Case, machine: Timer, loop: Loop) -> int:
    """The line of the look at the clock that begins the shortest interval with all that is lost in it, or that asks a
    short helper for it, one that ends where a sum is moved on before others; the loop's own where the clock is looked
    at once in it."""
    own = (each for each in machine.intervals.values() if each.since >= loop.begun)
    often = [each for each in own if each.spent > _SOME * (loop.now - loop.begun)]
    if len(often) < 2:
        return often[0].second[-1] if often else loop.line
    lost = _MOST * (loop.now - loop.begun - LIMIT)
    sums = (node for node in nodes(case.body.tree) if isinstance(node, ast.AugAssign))
    moved = {node.lineno for node in sums if isinstance(node.target, ast.Name)}
    between = min(often, key=lambda each: (each.spent < lost, each.second[-1] not in moved, each.spent))
    helpers = short_helpers(case.body.tree)
    begins, ends = (
        next((line for line in reversed(way) if not any(line in lines for lines in helpers)), way[-1])
        for way in (between.first, between.second)
    )
    return ends if ends in moved else begins  # t0 += time() - t1


__all__ = ["FASTEST", "After", "Overrun", "steps_after", "timed"]
