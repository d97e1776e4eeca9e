"""The run folder and its journal: append-only facts, one process at a time.

`Run` is what long work talks to: facts, curves, progress and ranks. Without a folder (library use, tests, ranks
beyond the first) the same calls keep the facts in memory and write nothing.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from fairway.base import files
from fairway.base.errors import FairwayError, RecipeError
from fairway.base.progress import Meter, meter
from fairway.base.ranks import Ranks


class Run:
    """One run's facts and files.

    folder: the run folder, or None for a run in memory; quiet: no progress, no lines on standard error.
    """

    def __init__(self, folder: Path | None = None, ranks: Ranks | None = None, quiet: bool = True) -> None:
        self.ranks = ranks or Ranks()
        self.folder = folder
        self.quiet = quiet or not self.ranks.first
        self.facts: dict[str, dict[str, Any]] = {}
        self._lock: IO[bytes] | None = None
        if folder is not None and self.ranks.first:
            self._lock = _locked(folder)
            for name in ("journal.jsonl", "curves.jsonl"):
                _end_torn_line(folder / name)
        if folder is not None:  # every rank knows what an earlier process finished
            for row in _rows(folder / "journal.jsonl"):
                row.pop("time", None)
                self.facts[row.pop("fact", "")] = row

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
        self._append("journal.jsonl", {"fact": name, "time": round(time.time(), 3), **values})

    def point(self, curve: str, step: int, **values: float) -> None:
        """Books one point of a curve."""
        self._append("curves.jsonl", {"curve": curve, "step": step, **values})

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def meter(self, label: str, total: float, unit: str, begun: float = 0.0) -> AbstractContextManager[Meter]:
        """A meter for `total` units of work, of which `begun` were done by an earlier process (a resumed run)."""
        return meter(label, total, unit, self.quiet, begun)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        path = self.path(name)
        try:
            with path.open("ab") as file:
                file.write(json.dumps(row, default=_plain).encode() + b"\n")
        except OSError as error:
            raise FairwayError(files.unwritable(path, error)) from error


def new_folder(root: Path, name: str, seed: int) -> Path:
    """A fresh run folder's path: <root>/<name>-<seed>-<time>, never one that exists."""
    stem = f"{name}-{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, again = root / stem, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            again += 1
            folder = root / f"{stem}-{again}"
        except OSError as error:
            raise RecipeError(f"{root}: {error.strerror}; name a folder that can be written") from error


def point_latest(folder: Path) -> None:
    """Lets `latest` beside the folder point to it (the newest completed run)."""
    link = folder.parent / "latest"
    temporary = folder.parent / f".latest-{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        os.replace(temporary, link)
    except OSError:  # a file system without links: the name of the folder does as well
        files.write(link, folder.name)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed while writing it
                continue
            if isinstance(row, dict):
                yield row


def _end_torn_line(path: Path) -> None:
    """Ends the half line that a killed run may have left, so that the next row does not continue it."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _plain(value: Any) -> Any:
    """What JSON can hold of a value foreign to it: the number of a numpy or torch scalar, else its text (a path)."""
    return value.item() if hasattr(value, "item") else str(value)


def _locked(folder: Path) -> IO[bytes]:
    """Takes the folder's lock, which dies with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab")
    except OSError as error:
        raise RecipeError(f"run folder {folder}: {error.strerror}; name a folder that can be written") from error
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise RecipeError(f"run folder {folder}: in use by another process; wait for it, or start a new run") from error
    return file
