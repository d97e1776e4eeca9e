"""The run folder and its journal: append-only facts, one process at a time.

`Run` is what long work talks to: facts, curves, progress and ranks. Without a folder (library use, tests, ranks
beyond the first) the same calls keep the facts in memory and write nothing.
"""

import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Self

from fairway.base.errors import RecipeError
from fairway.base.progress import Bar, Meter, meter
from fairway.base.ranks import Ranks
from fairway.base.slots import optional

JOURNAL, CURVES = "journal.jsonl", "curves.jsonl"


class Run:
    """One run's facts and files.

    folder: the run folder, or None for a run in memory; quiet: no progress, no lines on standard error; bar: what
    shows progress on a terminal, in place of lines.
    """

    def __init__(
        self, folder: Path | None = None, ranks: Ranks | None = None, quiet: bool = True, bar: Bar | None = None
    ) -> None:
        self.ranks = ranks or Ranks()
        self.folder, self.bar = folder, bar
        self.quiet = quiet or not self.ranks.first
        self.facts: dict[str, dict[str, Any]] = {}
        self._lock: IO[bytes] | None = None
        if folder is not None:
            take_up = optional("fairway.base.folders").take_up
            self._lock, self.facts = take_up(folder, self.ranks.first, (JOURNAL, CURVES))

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes the run folder."""
        return self.folder is not None and self.ranks.first

    def path(self, name: str) -> Path:
        if self.folder is None:
            raise RecipeError(f"{name}: this run has no folder to hold it")
        return self.folder / name

    def fact(self, name: str, **values: Any) -> None:
        """Books a fact: the last one of a name is what `facts` answers, all of them stay in the journal."""
        self.facts[name] = values
        self._append(JOURNAL, {"fact": name, "time": round(time.time(), 3), **values})

    def point(self, curve: str, step: int, **values: float) -> None:
        """Books one point of a curve."""
        self._append(CURVES, {"curve": curve, "step": step, **values})

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def meter(self, label: str, total: float, unit: str, begun: float = 0.0) -> AbstractContextManager[Meter]:
        """A meter for `total` units of work, of which `begun` were done by an earlier process (a resumed run)."""
        return meter(label, total, unit, self.quiet, begun, self.bar)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.writes:
            optional("fairway.base.folders").append(self.path(name), row)
