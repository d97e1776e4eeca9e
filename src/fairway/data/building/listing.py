"""Which files a build reads, in an order that no file system decides."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from fairway.base.errors import DataError, RecipeError

Kind: TypeAlias = Literal["text", "jsonl", "parquet"]

STANDARD_INPUT = "-"
PACKED = (".xz", ".gz", ".bz2", ".zst")
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_SHARD_MAGIC = (20240520).to_bytes(4, "little")


@dataclass(frozen=True)
class File:
    """One file of a source. path: None for standard input; name: within the source, for messages and for the listing's
    hash; bytes: as it lies, packed or not, 0 where nobody can know."""

    number: int
    path: Path | None
    name: str
    kind: Kind
    bytes: int


def files_of(sources: Sequence[str], kind: Kind | Literal["auto"] = "auto") -> list[File]:
    """The files of the sources as they are named, folders by the names in them, hidden ones left out.

    RecipeError for a file that is named twice, DataError for a place that cannot be read, a link that leads nowhere or
    back to a folder that it lies in, and a source without files.
    """
    found, seen = list[File](), dict[tuple[int, int], str]()
    for source in sources:
        if source == STANDARD_INPUT:
            if any(file.path is None for file in found):
                raise RecipeError("standard input (-): named twice; name each source once")
            if kind == "parquet":
                raise RecipeError("standard input (-): Parquet is read from its end; name a file instead")
            found.append(File(len(found), None, "standard input", "jsonl" if kind == "jsonl" else "text", 0))
            continue
        empty = True
        for path, inside, status in _walk(Path(source)):
            empty = False
            name = Path(*inside).as_posix() if inside else path.name
            identity = status.st_dev, status.st_ino
            if identity in seen and stat.S_ISREG(status.st_mode):
                raise RecipeError(f"{shown(path)}: is {shown(seen[identity])} again; name each file once")
            seen[identity] = str(path)
            found.append(File(len(found), path, name, _kind(path) if kind == "auto" else kind, _size(status)))
        if empty:
            raise DataError(f"{shown(source)}: no file in it; name a file or folder of text")
    return found


def sha256_of(files: Sequence[File]) -> str:
    """Of the files' names, kinds and sizes: what a resumed build compares before it reads anything."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{len(os.fsencode(file.name))} {file.kind} {file.bytes} ".encode() + os.fsencode(file.name))
    return digest.hexdigest()


def shown(place: str | Path) -> str:
    """A name as one line can hold it: line ends and what is no text are written as escapes."""
    text = os.fsencode(str(place)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unreadable(place: str | Path, error: Exception) -> DataError:
    """The one line for a file or folder that cannot be read."""
    why = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return DataError(f"{shown(place)}: {why}; name what can be read, or leave it out")


def refuse_shard(name: str, beginning: bytes) -> None:
    """DataError where a text begins as a shard of tokens does."""
    if beginning.startswith(_SHARD_MAGIC):
        raise DataError(f"{shown(name)}: a shard of tokens, not text; name the text that it was made from")


def _walk(root: Path) -> Iterator[tuple[Path, tuple[str, ...], os.stat_result]]:
    """(path, its names within the root, its status) of every file, links followed; open folders: those above it."""
    pending: list[tuple[Path, tuple[str, ...], frozenset[tuple[int, int]]]] = [(root, (), frozenset())]
    while pending:
        path, inside, above = pending.pop()
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            link = " (a link that leads nowhere, or in a circle)" if path.is_symlink() else ""
            raise unreadable(f"{path}{link}", error) from error
        if not stat.S_ISDIR(status.st_mode):
            if not stat.S_ISREG(status.st_mode) and inside:
                raise DataError(f"{shown(path)}: neither a file nor a folder; leave it out")
            yield path, inside, status
            continue
        identity = status.st_dev, status.st_ino
        if identity in above:
            raise DataError(f"{shown(path)}: a link back to a folder that it lies in; remove it, or name the files")
        try:
            names = sorted((name for name in os.listdir(path) if not name.startswith(".")), key=os.fsencode)
        except OSError as error:
            raise unreadable(path, error) from error
        pending += [(path / name, (*inside, name), above | {identity}) for name in reversed(names)]


def _kind(path: Path) -> Kind:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return _KINDS.get(suffixes[-1], "text") if suffixes else "text"


def _size(status: os.stat_result) -> int:
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
