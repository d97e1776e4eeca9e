"""How a sweep goes on, shown while it does: a table on a terminal, a plain line for each end in a log file."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fairway.lab.sweep.expecting import Expectation
from fairway.lab.sweep.one import Ended
from fairway.lab.sweep.plan import Planned
from fairway.lab.sweep.state import State, state_of
from fairway.recipe import Recipe

EVERY = 1.0  # seconds between two looks at the run folders


class Progress:
    """Who runs, who ended, and how long the rest may take. width: how many run at once."""

    def __init__(
        self, runs: Sequence[tuple[Planned, Recipe]], folder: Path, expectation: Expectation, width: int
    ) -> None:
        self.runs = {planned.id: (planned, recipe) for planned, recipe in runs}
        self.folder, self.expectation, self.width = folder, expectation, width
        self.running: dict[str, float] = {}  # id -> when it was started
        self.ended: dict[str, Ended] = {}

    def started(self, id_: str) -> None:
        self.running[id_] = time.monotonic()

    def finished(self, ended: Ended, training: float, result: float) -> str:
        """The line that tells of it. training: seconds that it spent on a training of its own."""
        return self._end(ended, training, f"{result:.4f} bits per byte")

    def failed(self, ended: Ended) -> str:
        return self._end(ended, None, f"failed: {ended.error}")

    def _end(self, ended: Ended, training: float | None, what: str) -> str:
        self.running.pop(ended.id, None)
        self.ended[ended.id] = ended
        self.expectation.end(ended.id, ended.seconds, training)
        planned, _ = self.runs[ended.id]
        left = f"; {_time(self.seconds_left())} left" if len(self.ended) < len(self.runs) else ""
        count = f"{len(self.ended)}/{len(self.runs)}"
        return f"{count:<7} {planned.recipe}, seed {planned.seed}: {what} ({ended.seconds:.0f} s{left})"

    def seconds_left(self) -> float | None:
        """For all that is not ended: None where no run has ended yet, here or before."""
        now, expected = time.monotonic(), self.expectation.seconds()
        if not expected and len(self.ended) < len(self.runs):
            return None
        left = [max(seconds - (now - self.running.get(id_, now)), 0.0) for id_, seconds in expected.items()]
        return max(sum(left) / self.width, max(left, default=0.0))

    def table(self) -> Group:
        """One line for each run on its way, one for all."""
        drawn = Table(box=None, pad_edge=False, show_header=False)
        expected = self.expectation.seconds()
        for id_, begun in self.running.items():
            planned, recipe = self.runs[id_]
            state = state_of(self.folder / planned.folder, recipe.train.schedule)
            passed = time.monotonic() - begun
            left = expected[id_] - passed if id_ in expected else state.seconds_left
            drawn.add_row(planned.recipe, f"seed {planned.seed}", *_shown(state, recipe), f"{_time(left)} left")
        total = f"{len(self.ended)} of {len(self.runs)} runs ended, {_time(self.seconds_left())} left"
        return Group(drawn, Text(total, style="bold"))


@contextmanager
def shown(progress: Progress, quiet: bool) -> Iterator["Screen"]:
    """Where a sweep shows itself: a live table on a terminal, lines elsewhere, nothing where `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield Screen(progress, quiet)
        return
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        yield Screen(progress, quiet, live)


class Screen:
    """Told of every moment and every end."""

    def __init__(self, progress: Progress, quiet: bool, live: Live | None = None) -> None:
        self.progress, self.quiet, self.live, self.last = progress, quiet, live, 0.0

    def look(self) -> None:
        now = time.monotonic()
        if self.live is not None and now - self.last >= EVERY:
            self.last = now
            self.live.update(self.progress.table(), refresh=True)

    def line(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(Text(text))
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _shown(state: State, recipe: Recipe) -> tuple[str, str, str]:
    if not state.step:
        return state.stage, "", ""
    whole = recipe.train.schedule
    total = f"{100 * state.done:.0f} %" if whole.by == "clock" else f"{whole.steps:,}"
    loss = "" if state.loss is None else f"loss {state.loss:.3f}"
    return state.stage, f"{state.step:,}/{total}" if whole.by == "steps" else f"step {state.step:,}, {total}", loss


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    seconds = max(seconds, 0.0)
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
