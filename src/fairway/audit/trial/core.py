"""What all parts of the machine share: the state of a trial, and what each part asks of the others."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fairway.audit.reading.kernels import Priced
from fairway.audit.reading.script import Layer, Script
from fairway.audit.settings import Settings
from fairway.audit.trial.arrays import Array, holds_sums, scalar, sum_of
from fairway.audit.trial.fitting import Fitting
from fairway.audit.trial.limits import WHOLE, Coarse, Forced, Limits, alone
from fairway.audit.trial.sums import LATE, PLACE, TAUGHT, Sum
from fairway.audit.trial.text import LENGTH
from fairway.audit.trial.told import Lesson, Told, Trial, Vectors
from fairway.audit.trial.turns import ELSEWHERE, HEAVY, HEAVY_TURNS, IDLE, PHASES, SOON, STEPS, Turns, staged
from fairway.audit.trial.values import UNKNOWN, Frame, Func, Obj, Raised, Spent, Value
from fairway.audit.trial.vocabulary import size_in

ELEMENTS = 2_000  # of an array: what is worked out in the time of a step
WAYS = 64  # calls that sum losses: of each is kept how often it did for each target
ASKED = 8  # lines in which losses of what was learned are made


_TEXTS = ("__str__", "__repr__")


class Core:
    """The state."""

    most_steps = STEPS
    idle_steps = IDLE
    idle_again = IDLE // 10  # of a loop that was left for that before
    heavy_turns = HEAVY_TURNS
    least_cut = LENGTH  # tokens of a text that is cut into several pieces where the script's are larger

    def __init__(self, script: Script, settings: Settings, forced: tuple[Forced, ...] = (), slow: float = 0.0) -> None:
        self.entry = script
        self.script = script
        self.settings = settings
        self.vocabulary = size_in(script.text)
        self.limits = Limits(forced)
        self.trial = Trial(vocabulary=self.vocabulary, limits=self.limits)
        self.plans = self.trial.plans
        self.looped: frozenset[int] = frozenset()
        self.handed_on: frozenset[int] = frozenset()
        self.widths: frozenset[int] = frozenset()
        self.kernels: dict[str, Priced] = {}  # that write losses
        self.operators: dict[str, str] = {}  # the script's own in torch.ops, and the names of their functions
        self.modules: dict[str, Value] = {}
        self.depth = 0
        self.stack: list[int] = []  # lines of the calls around it
        self.handlers = 0  # `try` statements that stand around
        self.pieces = 0  # the line of the last piece that was asked for
        self.spelt = 0  # how many pieces were asked for
        self.slow = slow  # steps of a turn of loops that are known to go through the tokens one by one
        self.touched = 0  # uses of the text so far
        self.embedded = 0  # times that weights of which nothing is known were asked for tokens
        self.made = 0  # losses of the text so far
        self.apart = 0  # losses of other tokens, and what a model makes of them, so far
        self.cut_at: dict[tuple[int, ...], int] = {}  # by the calls around it: the last line that cuts the whole text
        self.line = 0  # of the statement that is being worked out
        self.clock = 0.0
        self.in_thread = 0
        self.idled: set[int] = set()  # lines of loops that were left for using nothing of the text
        self.trained = 0  # how often something learned from what is not of the text
        self.scored: NDArray[np.int32] = np.zeros(LENGTH, dtype=np.int32)  # how often, in the evaluation under way
        self.undecided = 0  # how often a condition was one that nobody knows
        self.over = False  # whether a number of the whole text was told of it
        self.taught: NDArray[np.int32] = np.full(LENGTH, -1, dtype=np.int32)  # the lesson of each place
        self.taught_by: NDArray[np.int32] = np.zeros(LENGTH, dtype=np.int32)  # which calls ever learned from each place
        self.lessons = self.trial.lessons
        self.learned: NDArray[np.bool_] = np.zeros(LENGTH, dtype=bool)
        self.fitting = Fitting()
        self.rows_made = 0  # of the last tensor of nothing, 0 where nobody knows
        self.made_at = 0  # the line that made it
        self.functions: dict[str, Callable[..., Value]] = {}
        self.forms: dict[Value, tuple[str, int]] = {}
        self.models: list[Value] = []  # that were asked, whose ids are in `forms`

    def step(self, line: int = 0) -> None:
        self.line = line or self.line
        self.trial.steps += 1
        if self.trial.steps > self.most_steps:
            raise Spent

    def weigh(self, array: Array) -> None:
        """A large array costs as many steps as it takes the time of."""
        self.trial.steps += array.body.size // ELEMENTS
        if self.trial.steps > self.most_steps:
            raise Spent

    def cut(self, whole: Value, size: Value) -> None:
        """A length is cut into pieces of a size, rounded down, or up: `n // size`, `(n + size - 1) // size`,
        `-(-n // size)`. Coarse where that is the whole text's, and the pieces are larger."""
        length = self.trial.length
        if type(whole) is not int or type(size) is not int or size <= length or length < self.least_cut:
            return
        whole_text = any(WHOLE * length <= each <= length for each in (whole, whole - size + 1, -whole))
        if whole_text and self.limits.fresh(size) and (not self.least_cut or alone(self.script.tree, size)):
            raise Coarse(size)

    def piece_asked(self) -> None:
        self.pieces = self.line
        self.spelt += 1

    def mark(self, over: Value = None) -> Turns:
        """Where a loop begins. over: what it goes through."""
        known = len(over.body) if isinstance(over, Array) and over.body.ndim else operator.length_hint(over, 0)
        used = self.made + self.touched
        counts = self.trial.steps, self.trained, used, self.spelt, self.apart, self.undecided
        return Turns(*counts, known, self.made, self.line, staged=staged(over))

    def aimless(self, since: Turns) -> bool:
        """Whether a loop may be left after a turn: it trains on another text, or goes through another one, or has gone
        on for long without the text. Spent where a loop of so many turns, each so long, would take more steps than
        there are: over the tokens of this text one by one."""
        if since.staged:
            return False
        used = self.made + self.touched
        quiet = since.quietly(self.made)
        many = since.turns >= PHASES  # a loop over segments of the text learns and scores in every turn, and has few
        if self.trained > since.trained + 1 and (quiet or many):
            return True
        if self.apart > since.apart + ELSEWHERE and used == since.used:
            return True
        too_many = since.turn(self.trial.steps)
        if too_many and not since.known and used == since.used and self.undecided - since.undecided >= since.turns:
            self.idled.add(since.line)  # `while heap:` over what nobody knows
            return True
        if too_many and self.spelt == since.spelt and not self.slow:
            self.trial.slow = since.each(self.trial.steps)
            raise Spent
        again = since.line in self.idled
        tokens = SOON <= since.turns <= self.trial.length and since.each(self.trial.steps) < 2 * self.slow
        heavy = since.turns >= self.heavy_turns and since.each(self.trial.steps) >= HEAVY  # batches, read row by row
        most = self.idle_again if again or heavy else self.idle_steps
        idle = self.trial.steps > since.steps + most and used == since.used and (again or not tokens)
        if idle:
            self.idled.add(since.line)
        return idle

    def passed_over(self, error: Raised, node: ast.stmt, made: int) -> bool:
        """Whether a statement that raises is left out: the script ran, so what the trial does not know is to blame."""
        leaves = error.kind == "SystemExit" and not isinstance(error.value, str)  # with a message it is an error too
        meant = leaves or error.kind == "KeyboardInterrupt" or (error.kind == "StopIteration" and error.value)
        if self.handlers or meant:
            return False
        self.trial.left_out[node.lineno] = f"{error.kind} ({error.value})"
        if self.made > made:
            self.trial.unsure.add(node.lineno)
        return True

    def doubt(self, line: int) -> None:
        self.undecided += 1
        self.trial.doubts.add(line)

    def blur(self) -> None:
        """Losses are weighed by what the trial does not know."""
        self.trial.blurred.add(tuple(self.stack))

    def bend(self, line: int) -> None:
        """A function of one target's loss is worked out, whose price no sum of losses shows."""
        self.trial.bent.add(line)

    def shown(self, value: Value, line: int) -> None:
        """A value becomes text: a sum of losses among them is told."""
        if isinstance(value, Obj):
            self.spelt_out(value, line)
            return
        found = self.single(value)
        if isinstance(found, Sum):
            self.trial.told.append(Told((*self.stack, self.line), found, len(self.trial.told)))
            whole = np.count_nonzero(found.counts(LENGTH)[0]) > WHOLE * self.trial.length
            self.over = self.over or bool(whole)
            self.plans.told()

    def spelt_out(self, value: Obj, line: int) -> None:
        """An object becomes text: by its own method, told where that is asked for; a dataclass tells its fields."""
        method = next((found for name in _TEXTS if isinstance(found := value.kind.find(name), Func)), None)
        before, at = len(self.trial.told), (*self.stack, self.line)
        if method is not None:
            self.call(method, (value,), {}, line)
        elif value.kind.made:
            for part in value.vars.values():
                if not isinstance(part, Obj):
                    self.shown(part, line)
        for number, told in enumerate(self.trial.told[before:], before):
            self.trial.told[number] = replace(told, stack=at)

    def read_clock(self) -> float:
        """Seconds: a trial takes none."""
        self.clock += 1e-4
        return self.clock

    def ramp(self, part: Value, whole: Value) -> Value:
        """part / (part + most): the whole that it is a part of."""
        return whole

    def learn(self, value: Value) -> None:
        """backward(): something learns from the targets of these losses."""
        found = self.single(value)
        if not isinstance(found, Sum):
            self.trained += 1
            self.trial.untold.add(tuple(self.stack))
            return
        total, _ = found.counts(LENGTH)
        if not total.any():
            self.trained += found.elsewhere()
            return
        calls = tuple(self.stack)
        if self.trial.fitted:
            self.fitting.learn(found)
        if calls in self.trial.taught_in or len(self.trial.taught_in) < len(TAUGHT):
            bit = self.trial.taught_in.setdefault(calls, TAUGHT[len(self.trial.taught_in) % len(TAUGHT)])
            self.taught_by[total > 0] |= bit
        fresh = (total > 0) & ~self.learned
        if fresh.any():
            self.learned |= fresh
            early = fresh & (self.scored <= 1)  # its own loss is the first
            self.trial.early |= early
            cut = self.cut_at.get(tuple(self.stack), 0)
            self.lessons.append(Lesson((*self.stack, self.line), int(fresh.sum()), int(early.sum()), cut=cut))
            self.taught[fresh] = len(self.lessons) - 1

    def booked(self, value: Value) -> Value:
        """A sum of losses is made, or one for each row of them, `nll.sum(1)`, if need be beside what was there."""
        if isinstance(value, Array) and holds_sums(value) and value.num is not None:
            for each in value.num.flat:
                for part in (each, *(one for one, _ in each.parts)) if isinstance(each, Sum) else ():
                    if not part.way:
                        self.booked(part)
        if isinstance(value, Sum) and value.places is not None:
            self.trial.steps += value.places.size // ELEMENTS
            self.trial.summed.add(self.line)
            places = value.places & PLACE
            value.way = (*self.stack, self.line)
            if self.over and value.way[:-1] not in self.trial.taught_in and self.scored[places].any():
                self.scored[:], self.over = 0, False  # another evaluation, and no step of the one that was told
            self.scored[places] += 1  # numpy adds once where an index stands twice
            if value.weights is not None:
                self._counted_in(value.way, places[value.weights != 0])
        return value

    def _counted_in(self, way: tuple[int, ...], places: NDArray[np.int32]) -> None:
        """How often each place was summed there, and whether one was for the second time."""
        times = self.trial.booked.get(way)
        if times is None:
            if len(self.trial.booked) >= WAYS:
                return
            times = self.trial.booked[way] = np.zeros(LENGTH, dtype=np.int32)
        if way not in self.trial.again and times[places].any():
            self.trial.again[way] = int(np.count_nonzero(times))
        times[places] += 1

    def marked(self, pos: NDArray[np.int32]) -> NDArray[np.int32]:
        """The places of targets that are being scored: marked where something learned from them before."""
        if not (pos >= 0).any():
            self.apart += 1
            return pos.astype(np.int32)
        self.made += 1
        if len(self.trial.asked_in) < WAYS:
            self.trial.asked_in.add(tuple(self.stack))
        self.trial.steps += pos.size // ELEMENTS
        if pos.size == 1:  # token by token: numpy takes ten times as long over one
            return np.full(pos.shape, self._marked_one(int(pos.item()) & PLACE), np.int32)
        clean = np.where(pos >= 0, pos & PLACE, -1).astype(np.int32)
        where = np.minimum(np.maximum(clean, 0), LENGTH - 1)
        late = (clean >= 0) & self.learned[where]
        for each in np.flatnonzero(np.bincount(self.taught[clean[late]])):
            self._ask(int(each))
        marks = np.where(clean >= 0, self.taught_by[where], 0)
        return np.where(late, clean + LATE, clean).astype(np.int32) + marks

    def _marked_one(self, place: int) -> int:
        at = min(place, LENGTH - 1)
        late = bool(self.learned[at])
        if late:
            self._ask(int(self.taught[at]))
        return place + (LATE if late else 0) + int(self.taught_by[at])

    def _ask(self, number: int) -> None:
        """What a lesson taught is asked for in a line."""
        lesson = self.lessons[number]
        if all(stack[-1] != self.line for stack in lesson.asked) and len(lesson.asked) < ASKED:
            self.lessons[number] = replace(lesson, asked=(*lesson.asked, (*self.stack, self.line)))

    def restored(self) -> Value:
        """Weights are put back: what was learned before may be gone. The trial takes it for gone."""
        self.learned[:] = False
        self.taught[:] = -1
        return UNKNOWN  # which of them were missing, and which nobody asked for

    def single(self, value: Value) -> Value:
        """A number or Sum out of an array of one."""
        if isinstance(value, Array) and value.lossy and value.body.size > 1:
            return sum_of(value)
        return scalar(value)

    def losses(self, target: Array) -> Array:
        """What a model says of these targets, one loss for each."""
        pos = target.pos if target.pos is not None else np.full(target.shape, -1, np.int32)
        places = self.marked(pos)
        if self.trial.fitted:
            places = places + self.fitting.marks(pos, pos.shape if pos.ndim > 1 else target.was, target.rows)
            self.trial.vectors = Vectors(self.fitting.shared[0], self.fitting.shared[1], self.made_at)
        losses = Array(None, np.array(places), np.ones(target.shape))  # of no dimension, numpy makes it a number
        losses.was = target.was
        return losses.as_picked(target)

    # -- what the parts ask of each other -------------------------------------------------------------------------

    def call(self, func: Value, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        raise NotImplementedError

    def call_function(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        raise NotImplementedError

    def leaf(self) -> Value:
        raise NotImplementedError

    def of_module(self, func: Func, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        raise NotImplementedError

    def of_array(self, name: str, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        raise NotImplementedError

    def enter(self, manager: Value) -> Value:
        raise NotImplementedError

    def leave(self, manager: Value, error: Raised | None) -> bool:
        raise NotImplementedError

    def attribute(self, value: Value, name: str) -> Value:
        raise NotImplementedError

    def assign_attribute(self, value: Value, name: str, new: Value) -> None:
        raise NotImplementedError

    def item(self, value: Value, index: Value) -> Value:
        raise NotImplementedError

    def items(self, value: Value) -> Iterator[Value]:
        raise NotImplementedError

    def truth(self, value: Value) -> bool:
        raise NotImplementedError

    def layer(self, how: tuple[str, ...], fits: Callable[[Layer], bool]) -> Layer | None:
        raise NotImplementedError

    def body(self, script: Script, frame: Frame) -> None:
        raise NotImplementedError
