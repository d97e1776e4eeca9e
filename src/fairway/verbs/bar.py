"""Progress on a terminal: a bar of the rich library."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fairway.base.lines import short


class Bar:
    """One task's bar."""

    def __init__(self, label: str, total: float, unit: str, begun: float) -> None:
        self.unit, self.begun, self.start = unit, begun, time.monotonic()
        self.drawn = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.drawn.add_task(label, total=total, completed=int(begun), facts="")

    def update(self, done: float, **shown: float) -> None:
        rate = (done - self.begun) / max(time.monotonic() - self.start, 1e-9)
        facts = "  ".join([*(f"{k} {v:.4g}" for k, v in shown.items()), f"{short(rate)} {self.unit}/s"])
        self.drawn.update(self.task, completed=done, facts=facts)


@contextmanager
def bar(label: str, total: float, unit: str, begun: float = 0.0) -> Iterator[Bar]:
    """A bar for `total` units of work, closed properly however the work ends."""
    made = Bar(label, total, unit, begun)
    with made.drawn:
        yield made
