"""Run folders: their names, their lock, the rows that an earlier process left in them."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fairway.base import files
from fairway.base.errors import FairwayError, RecipeError


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether runs of a recipe (its plain table) have a folder: where they train."""
    return "train" in recipe


def take_up(folder: Path, first: bool, names: tuple[str, str]) -> tuple[IO[bytes] | None, dict[str, dict[str, Any]]]:
    """(the lock, on the first rank; the last fact of each name, which every rank knows). names: journal, curves."""
    lock = locked(folder) if first else None
    for name in names if first else ():
        end_torn_line(folder / name)
    facts: dict[str, dict[str, Any]] = {}
    for row in rows(folder / names[0]):
        row.pop("time", None)
        facts[row.pop("fact", "")] = row
    return lock, facts


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


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed while writing it
                continue
            if isinstance(row, dict):
                yield row


def append(path: Path, row: dict[str, Any]) -> None:
    """One more row at the end of a file of JSON lines."""
    try:
        with path.open("ab") as file:
            file.write(json.dumps(row, default=_plain).encode() + b"\n")
    except OSError as error:
        raise FairwayError(files.unwritable(path, error)) from error


def _plain(value: Any) -> Any:
    """What JSON can hold of a value foreign to it: the number of a numpy or torch scalar, else its text (a path)."""
    return value.item() if hasattr(value, "item") else str(value)


def end_torn_line(path: Path) -> None:
    """Ends the half line that a killed run may have left, so that the next row does not continue it."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def locked(folder: Path) -> IO[bytes]:
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
