"""Clocks and budgets. A budget is an assertion at run time, with the same verdict on every rank."""

import math
import time
from collections.abc import Callable

from fairway.base.errors import BudgetError
from fairway.base.ranks import Ranks


class Stopwatch:
    """Seconds spent between `start` and `stop`, over any number of laps, beginning at `spent` (a resumed run)."""

    def __init__(self, spent: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self._spent, self._now = spent, now
        self._since: float | None = None

    def start(self) -> "Stopwatch":
        if self._since is None:
            self._since = self._now()
        return self

    def stop(self) -> float:
        self._spent, self._since = self.seconds, None
        return self._spent

    @property
    def seconds(self) -> float:
        return self._spent + (self._now() - self._since if self._since is not None else 0.0)

    def __enter__(self) -> "Stopwatch":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def hold(name: str, value: float, limit: float, unit: str, remedy: str, ranks: Ranks | None = None) -> None:
    """Raises BudgetError on every rank when any rank's value is over the limit (a limit of 0 means none). A value that
    is not a number counts as infinite: it was not measured, and a maximum over ranks would depend on their order."""
    worst = (ranks or Ranks()).max(math.inf if math.isnan(value) else value)
    if limit and worst > limit:
        raise BudgetError(f"{name}: {_shown(worst)} {unit} is over the limit of {_shown(limit)}; {remedy}")


def _shown(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"
