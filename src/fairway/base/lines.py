"""Progress in a log file: plain lines."""

import sys
import time
from collections.abc import Mapping
from typing import Any


def wanted(recipe: Mapping[str, Any]) -> bool:
    """No script shows progress: what it does is printed as it is done."""
    return False


class Lines:
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


def _line(label: str, done: float, total: float, unit: str, begun: float, seconds: float, shown: dict[str, Any]) -> str:
    rate = (done - begun) / max(seconds, 1e-9)
    left = f"{max(total - done, 0) / rate:.0f}" if rate > 0 else "?"
    facts = "".join(f"  {key} {value:.4g}" for key, value in shown.items())
    return (
        f"{label:<12} {100 * done / max(total, 1e-9):3.0f}%  {short(done)}/{short(total)} {unit}{facts}"
        f"  {short(rate)} {unit}/s  {seconds:.0f} s, {left} s left"
    )


def short(value: float) -> str:
    """Three digits or so, never in powers of ten: 950, 9,500, 95.0k, 9.50M."""
    for size, above, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if value >= above:
            value /= size
            return f"{value:.0f}{letter}" if value >= 100 else f"{value:.3g}{letter}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
