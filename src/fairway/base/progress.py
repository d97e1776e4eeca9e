"""Progress: a bar on a terminal, plain lines in a log file; always the rate and the time left."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from fairway.base.slots import optional


class Meter(Protocol):
    """What long work talks to."""

    def update(self, done: float, **shown: float) -> None: ...


class Silent:
    """Shows nothing: other ranks, tests, --json."""

    def update(self, done: float, **shown: float) -> None:
        return None


Bar = Callable[[str, float, str, float], AbstractContextManager[Meter]]
"""(label, total, unit, begun) -> the same on a terminal: handed over by the command line, which may import more."""


@contextmanager
def meter(
    label: str, total: float, unit: str, quiet: bool = False, begun: float = 0.0, bar: Bar | None = None
) -> Iterator[Meter]:
    """A meter for `total` units of work, `begun` of them done before (the rate counts only what is done here); closed
    properly however the work ends."""
    if quiet:
        yield Silent()
    elif bar is not None and sys.stderr.isatty():
        with bar(label, total, unit, begun) as shown:
            yield shown
    else:
        yield optional("fairway.base.lines").Lines(label, total, unit, begun)
