"""What a script does that a rule may ask about, in the order in which it does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from fairway.audit.flow.tokens import Tok
from fairway.audit.flow.values import Value
from fairway.audit.verdict import Place

if TYPE_CHECKING:
    from fairway.audit.flow.heap import Obj

Nest: TypeAlias = tuple[tuple[int, int], ...]
"""The loops an event stands in, outermost first: (loop, iteration)."""

How: TypeAlias = Literal["gradient", "table", "computed", "written"]
"""gradient: an optimizer's step or a write of gradients; table: token ids entered into a container or an array;
computed: weights replaced by what was computed from activations (calibration); written: another in-place write."""


MOVING = float("inf")  # of a scale: no number that is written out


@dataclass(frozen=True)
class Event:
    """number: position in the trace; stack: the calls it stands in, outermost first (the last is its own place);
    guards: the places of the conditions on settings that nobody could decide and that it stands under."""

    number: int
    place: Place
    stack: tuple[Place, ...]
    nest: Nest
    guards: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Score(Event):
    """A loss: bit `bit` in Value.losses. targets: the tokens it is the loss of; states: the learners that made it;
    knows: bits of the Updates they had seen; choices: bits of the Choices they hang on; parts: the Scores it was made
    of; scaled: logits were divided or multiplied by a state of their own, or by a number that was chosen; one_row: the
    batch was one window; scale: the constant that the logits were divided by last, MOVING where it was another one in
    each turn of a loop; whole: for a part of a loss, the Scores of all of it."""

    bit: int = 0
    targets: frozenset[Tok] = frozenset()
    states: frozenset[Obj] = frozenset()
    knows: int = 0
    choices: int = 0
    parts: int = 0
    scaled: bool = False
    one_row: bool = False
    scale: float | None = None
    whole: int = 0


@dataclass(frozen=True)
class Update(Event):
    """A state learns: bit `bit` in Value.knows. learned: the tokens it learned from; how: see How; losses: the Scores
    whose gradient it followed; fresh: the loops that the state was made or reset in; still: at a rate that moves
    nothing, so that nobody knows of it."""

    bit: int = 0
    state: Obj | None = None
    learned: frozenset[Tok] = frozenset()
    how: How = "written"
    losses: int = 0
    fresh: Nest = ()
    still: bool = False


@dataclass(frozen=True)
class Choice(Event):
    """Something is chosen by comparing losses: bit `bit` in Value.choices. form: "min", "where", "if", "index", or
    "fit" where a number was computed from them."""

    bit: int = 0
    losses: int = 0
    form: str = "if"
    operands: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Said(Event):
    """A number with losses in it is printed, logged, written or returned as the result. text: the literal texts."""

    value: Value = field(default_factory=Value)
    text: str = ""
    how: Literal["printed", "written", "returned"] = "printed"


@dataclass(frozen=True)
class Forward(Event):
    """A model is run on tokens."""

    state: Obj | None = None
    toks: frozenset[Tok] = frozenset()


@dataclass(frozen=True)
class Clock(Event):
    """Elapsed time is compared with a limit. limit: the seconds (or milliseconds) after which it holds, None where
    that is not known; text: the comparison."""

    limit: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Call(Event):
    """A call of something that is not in the script: "torch.where", ".gather"."""

    name: str = ""
    arguments: tuple[Value, ...] = ()
    keywords: tuple[tuple[str, Value], ...] = ()
    result: Value = field(default_factory=Value)


@dataclass(frozen=True)
class Unknown(Event):
    """Where the interpreter gave up, and why."""

    why: str = ""


@dataclass(frozen=True)
class Read:
    """Where data is read. stack: the calls; mixed: training and validation files; pattern: one that fits both kinds
    alike, or ""; after: how many events came before the first time; kinds: of the data that it read then."""

    stack: tuple[Place, ...]
    mixed: bool = False
    pattern: str = ""
    after: int = field(default=0, compare=False)
    kinds: tuple[str, ...] = field(default=(), compare=False)


@dataclass(eq=False)
class Trace:
    """All that happened. `scores`, `updates` and `choices` are indexed by the bit of their event."""

    events: list[Event] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    loops: dict[int, Place] = field(default_factory=dict)
    within: dict[int, int] = field(default_factory=dict)  # loop -> the function that it stands in
    depth: dict[int, int] = field(default_factory=dict)  # loop -> how many calls deep it stood at least
    broken: dict[int, Place] = field(default_factory=dict)  # loop -> where a counter or the clock ends it early
    picked: dict[int, Place | None] = field(default_factory=dict)  # loss -> the condition that leaves others out
    scalers: set[Obj] = field(default_factory=set)  # states that logits of others were multiplied by
    weighed: int = 0  # bits of the Choices by which weights were picked out of several
    own: int = 0  # and of those by which one of the sums that were compared was picked: `sums[sums.argmin()]`
    masked: dict[int, int] = field(default_factory=dict)  # loss that a mask on losses picks -> the Choices of that mask
    gaps: dict[int, Place] = field(default_factory=dict)  # loop -> the slice that is shorter than its step
    files: dict[str, Place] = field(default_factory=dict)  # "1" -> where only the first of several files is taken
    limits: dict[str, Place] = field(default_factory=dict)  # a Tok's part -> where a constant lets only so many through
    reads: list[Read] = field(default_factory=list)
    gathered: list[tuple[int, int]] = field(default_factory=list)  # sums over all ranks: (events before, their losses)
    orders: list[tuple[int, Place]] = field(default_factory=list)  # sorts by lengths: (events before, where)
    averaged: list[int] = field(default_factory=list)  # gradients or weights made one over all ranks: events before
    recalled: set[tuple[Place, ...]] = field(default_factory=set)  # ways to tables whose keys came out of other tables
    saved: list[int] = field(default_factory=list)  # numbers of the events that follow a model's writing to a file
    steps: int = 0
    complete: bool = True

    def in_one_call(self, loop: int, one: Event, other: Event) -> bool:
        """Whether a loop around two events is the same in one call of its function, and not in two."""
        above = self.depth.get(loop, 1) - 1
        return one.stack[:above] == other.stack[:above]

    def scored(self, mask: int) -> Iterator[Score]:
        """The Scores of a mask, with those that they were made of."""
        seen, waiting = 0, mask
        while waiting:
            low = waiting & -waiting
            waiting ^= low
            seen |= low
            score = self.scores[low.bit_length() - 1]
            yield score
            waiting |= score.parts & ~seen

    def family(self, mask: int) -> int:
        """Scores with what they are made of and parts of."""
        seen, waiting = 0, mask
        while waiting:
            low = waiting & -waiting
            waiting ^= low
            seen |= low
            score = self.scores[low.bit_length() - 1]
            waiting |= (score.parts | score.whole) & ~seen
        return seen

    def learned(self, mask: int) -> Iterator[Update]:
        """The Updates of a mask."""
        for bit in bits(mask):
            yield self.updates[bit]

    def chosen(self, mask: int) -> Iterator[Choice]:
        """The Choices of a mask."""
        for bit in bits(mask):
            yield self.choices[bit]

    def unknowns(self) -> list[Unknown]:
        """Where the interpreter gave up."""
        return [event for event in self.events if isinstance(event, Unknown)]


def bits(mask: int) -> Iterator[int]:
    """The positions of the ones, lowest first."""
    while mask:
        low = mask & -mask
        mask ^= low
        yield low.bit_length() - 1
