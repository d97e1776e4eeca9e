"""How long a trial may take: the steps of all of it, and of the turns of one loop."""

from __future__ import annotations

from collections.abc import ItemsView, ValuesView
from dataclasses import dataclass
from typing import Final

from fairway.audit.trial.text import DOCUMENT, LENGTH, SHORT
from fairway.audit.trial.values import Bound, Func, Obj, Value

STEPS: Final = 250_000
IDLE: Final = 60_000  # steps: a table over 8,192 pieces takes that
HEAVY: Final = 200  # steps of a turn that is none over pieces or tokens
HEAVY_TURNS: Final = 12  # of those, after which a tenth of the steps is enough
MANY: Final = 4_000  # turns of a loop: over tokens, and not over windows
SOON: Final = 1_000  # turns after which that is asked of a loop whose number of turns is known
PHASES: Final = 6  # turns of a loop that trains on what the trial does not know, and scores the text
ELSEWHERE: Final = 3  # uses of another text, in a loop that uses nothing of this one
SHARE: Final = 0.9  # of the steps that may go into one such loop
ROOM: Final = 160_000  # the same over a shorter text: 2 s
_STAGES = 40  # of a program, at most


@dataclass
class Turns:
    """A loop that is under way. steps, trained, used, spelt, apart, undecided: the machine's counts where it began;
    turns: since then; known: how many there will be, 0 where that is not known; last: the losses of the text before
    the last turn; line: of the loop; staged: each turn does something of its own; quiet: turns in a row, up to the
    last one, that made no loss of the text."""

    steps: int
    trained: int
    used: int
    spelt: int
    apart: int
    undecided: int
    known: int
    last: int
    line: int
    turns: int = 0
    staged: bool = False
    quiet: int = 0

    def quietly(self, made: int) -> bool:
        """Counts the losses of the text so far: whether the last two turns made none. One turn alone may be a phase for
        which the short text has no documents."""
        self.quiet = self.quiet + 1 if made == self.last else 0
        self.last = made
        return self.quiet > 1

    def turn(self, steps: int) -> bool:
        """Counts a turn: whether it is known now that as many as the text has tokens are too many."""
        self.turns += 1
        asked = SOON if self.known >= MANY else MANY
        return self.turns == asked and self.each(steps) * LENGTH > SHARE * STEPS

    def each(self, steps: int) -> float:
        """Steps of one turn; of the first one before it has ended."""
        return (steps - self.steps) / max(self.turns, 1)


def staged(over: Value) -> bool:
    """Whether a loop goes through things to do: functions, by themselves or held by objects or rows, objects of several
    classes, or names. No turn of it says what the next one is for."""
    if isinstance(over, (dict, ItemsView, ValuesView)):
        over = list(over.items() if isinstance(over, dict) else over)
    if not isinstance(over, (list, tuple)) or not 1 < len(over) <= _STAGES:
        return False
    kinds = {each.kind for each in over if isinstance(each, Obj)}
    named = all(isinstance(each, str) and each.isidentifier() for each in over)
    return named or len(kinds) > 1 or any(map(_does, over))


def _does(value: Value) -> bool:
    parts = value if isinstance(value, (list, tuple)) else value.vars.values() if isinstance(value, Obj) else (value,)
    return any(isinstance(each, Func) or (isinstance(each, Bound) and isinstance(each.what, Func)) for each in parts)


def shorter(each: float) -> int:
    """The tokens of a text that a loop of so many steps a token can go through; 0 where there is none."""
    return next((length for length in (SHORT, DOCUMENT + 1) if each * length < ROOM), 0)


__all__ = ["HEAVY", "HEAVY_TURNS", "IDLE", "PHASES", "SOON", "STEPS", "Turns", "shorter", "staged"]
