"""Progress: a bar on a terminal, plain lines in a log file; always the rate and the time left."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Meter(Protocol):
    """What long work talks to."""

    def update(self, done: float, **shown: float) -> None: ...


class Silent:
    """Shows nothing: other ranks, tests, --json."""

    def update(self, done: float, **shown: float) -> None:
        return None


class _Lines:
    """A line every `every` seconds: what a log file wants."""

    def __init__(self, label: str, total: float, unit: str, begun: float = 0.0, every: float = 5.0) -> None:
        self.label, self.total, self.unit, self.begun, self.every = label, total, unit, begun, every
        self.start = self.last = time.monotonic()

    def update(self, done: float, **shown: float) -> None:
        now = time.monotonic()
        if now - self.last < self.every and not (done >= self.total and now - self.start > 1.0):
            return
        self.last = now
        line = _line(self.label, done, self.total, self.unit, self.begun, now - self.start, shown)
        print(line, file=sys.stderr, flush=True)


class _Bar:
    """A bar of the rich library, on a terminal."""

    def __init__(self, label: str, total: float, unit: str, begun: float = 0.0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.unit, self.begun, self.start = unit, begun, time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.bar.start()
        self.task = self.bar.add_task(label, total=total, completed=int(begun), facts="")

    def update(self, done: float, **shown: float) -> None:
        rate = (done - self.begun) / max(time.monotonic() - self.start, 1e-9)
        facts = "  ".join([*(f"{k} {v:.4g}" for k, v in shown.items()), f"{_count(rate)} {self.unit}/s"])
        self.bar.update(self.task, completed=done, facts=facts)


@contextmanager
def meter(label: str, total: float, unit: str, quiet: bool = False, begun: float = 0.0) -> Iterator[Meter]:
    """A meter for `total` units of work, `begun` of them done before (the rate counts only what is done here); closed
    properly however the work ends."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        bar = _Bar(label, total, unit, begun)
        try:
            yield bar
        finally:
            bar.bar.stop()
    else:
        yield _Lines(label, total, unit, begun)


def _line(label: str, done: float, total: float, unit: str, begun: float, seconds: float, shown: dict[str, Any]) -> str:
    rate = (done - begun) / max(seconds, 1e-9)
    left = f"{max(total - done, 0) / rate:.0f}" if rate > 0 else "?"
    facts = "".join(f"  {key} {value:.4g}" for key, value in shown.items())
    return (
        f"{label:<12} {100 * done / max(total, 1e-9):3.0f}%  {_count(done)}/{_count(total)} {unit}{facts}"
        f"  {_count(rate)} {unit}/s  {seconds:.0f} s, {left} s left"
    )


def _count(value: float) -> str:
    """Three digits or so, never in powers of ten: 950, 9,500, 95.0k, 9.50M."""
    for size, above, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if value >= above:
            value /= size
            return f"{value:.0f}{letter}" if value >= 100 else f"{value:.3g}{letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
