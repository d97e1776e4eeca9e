"""The files that a trial has: shards of a training and of a validation text, and the script itself."""

from __future__ import annotations

import fnmatch
import re
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np

from fairway.audit.trial.arrays import Array, scalar
from fairway.audit.trial.text import DOCUMENT, FEWER, TRAIN, length, tokens
from fairway.audit.trial.values import UNKNOWN, Value
from fairway.audit.trial.vocabulary import octets

HEADER = 256
_SMALL = 100_000  # characters of a file that the script writes
MAGIC = 20240520
NAMES = ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin")
_VAL = re.compile(r"val|valid|held|eval|test", re.I)
_SIDECAR = re.compile(r"byte|octet", re.I)  # what each token of the text takes of it, written beside the tokens


class Room(Protocol):
    """The files of something else than the scoring of a text: of the preparation of one."""

    def exists(self, path: str) -> bool: ...
    def listed(self, pattern: str) -> list[str]: ...
    def open(self, path: str, mode: Value = "r") -> Value: ...


room: ContextVar[Room | None] = ContextVar("room", default=None)
"""Where a preparation under way reads and writes; none in a trial of a score."""


class Path:
    """pathlib.Path, as a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    @property
    def suffix(self) -> str:
        return "." + self.name.rpartition(".")[2] if "." in self.name else ""

    @property
    def parent(self) -> Path:
        return Path(self.text.rpartition("/")[0] or ".")

    def resolve(self, *_: Value) -> Path:
        return self

    expanduser = absolute = resolve

    def joinpath(self, *parts: Value) -> Path:
        return Path("/".join([self.text, *map(str, parts)]))

    def with_suffix(self, suffix: str) -> Path:
        return Path(self.text.removesuffix(self.suffix) + suffix)

    def with_name(self, name: str) -> Path:
        return self.parent.joinpath(name)

    def exists(self) -> bool:
        other = room.get()
        return other is None or other.exists(self.text)

    is_file = is_dir = exists

    def as_posix(self) -> str:
        return self.text

    def glob(self, pattern: str) -> Value:
        return [Path(each) for each in found(f"{self.text}/{pattern}")]

    rglob = glob

    def mkdir(self, *_: Value, **__: Value) -> None:
        return None

    unlink = touch = mkdir

    def stat(self) -> Stat:
        return Stat(self.text)

    def read_bytes(self, *_: Value, **__: Value) -> Value:
        return opened(self.text, "rb").read()

    def read_text(self, *_: Value, **__: Value) -> Value:
        other = room.get()
        if other is not None:
            return other.open(self.text).read()
        written = disc.get({}).get(self.text)
        return written if isinstance(written, str) else UNKNOWN

    def iterdir(self) -> Value:
        return [Path(f"{self.text}/{name}") for name in NAMES]

    def write_bytes(self, value: Value, *_: Value, **__: Value) -> Value:
        other = room.get()
        if other is not None:
            return other.open(self.text, "wb" if isinstance(value, (bytes, bytearray)) else "w").write(value)
        disc.get({})[self.text] = value
        return UNKNOWN

    write_text = write_bytes

    def rename(self, there: Value) -> Value:
        moved(self, there)
        return there

    replace = rename

    def open(self, mode: str = "r", *_: Value, **__: Value) -> Value:
        return opened(self.text, mode)

    def __str__(self) -> str:
        return self.text

    __fspath__ = __repr__ = __str__

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Path) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __lt__(self, other: Path) -> bool:
        return self.text < other.text


disc: ContextVar[dict[str, Value]] = ContextVar("disc")
"""What the trial under way wrote into small files of its own: a counter that ranks share, a list of what is done."""


class Stat:
    """os.stat: a shard has the size that its header says; of others nobody knows."""

    def __init__(self, text: str) -> None:
        size = size_of(text)
        self.st_size: Value = UNKNOWN if size is None else size


class File:
    """An open file: a shard, or one that the script wrote itself."""

    def __init__(self, text: str, mode: Value = "r") -> None:
        self.text = text
        self.at = 0
        self.own = disc.get({}) if not count_of(text) else {}
        if isinstance(mode, str) and mode[:1] in ("w", "x"):
            self.own[text] = b"" if "b" in mode else ""
        elif isinstance(mode, str) and mode[:1] == "a" and isinstance(self.own.get(text), (str, bytes)):
            self.at = len(self.own[text])

    def entered(self) -> File:
        return self

    def left(self, error: Value) -> bool:
        return False

    def read(self, count: Value = -1, *_: Value) -> Value:
        size = size_of(self.text)
        number = scalar(count)
        written = self.own.get(self.text)
        if isinstance(written, (str, bytes)):
            begun, self.at = self.at, len(written) if not isinstance(number, int) or number < 0 else self.at + number
            return written[begun : self.at]
        if size is None:
            return UNKNOWN
        stop = min(self.at + number, size) if isinstance(number, int) and number >= 0 else size
        found = Raw(self.text, self.at, stop)
        self.at = stop
        return found

    def readlines(self, *_: Value) -> Value:
        return UNKNOWN

    readline = readlines

    def fileno(self) -> File:
        return self

    def seek(self, place: Value, whence: Value = 0, *_: Value) -> None:
        number = scalar(place)
        if isinstance(number, int):
            self.at = {0: 0, 1: self.at, 2: size_of(self.text) or 0}.get(whence, 0) + number

    def tell(self) -> int:
        return self.at

    def write(self, value: Value, *_: Value) -> None:
        held: Any = self.own.get(self.text)
        if isinstance(held, (str, bytes)) and type(value) is type(held) and len(held) < _SMALL:
            more: Any = value
            self.own[self.text] = held[: self.at] + more + held[self.at + len(more) :]
            self.at += len(more)
        else:
            self.own[self.text] = UNKNOWN

    def truncate(self, size: Value = None, *_: Value) -> None:
        held = self.own.get(self.text)
        if isinstance(held, (str, bytes)):
            self.own[self.text] = held[: size if isinstance(size, int) else self.at]

    def close(self) -> None:
        return None

    flush = close


def opened(text: str, mode: Value = "r") -> Value:
    """open(text, mode)."""
    other = room.get()
    return File(text, mode) if other is None else other.open(text, mode)


def text_of(value: Value) -> str | None:
    """A path as text; None for what is none."""
    return value.text if isinstance(value, (Path, File)) else value if isinstance(value, str) else None


def moved(here: Value, there: Value, *_: Value, **__: Value) -> None:
    """os.replace(here, there): what the script wrote to the one is read from the other."""
    one, other, own = text_of(here), text_of(there), disc.get({})
    if room.get() is None and one in own and other is not None:
        own[other] = own[one]


class Scratch:
    """tempfile.TemporaryDirectory"""

    name = "/tmp/scratch"

    def entered(self) -> str:
        return self.name

    def cleanup(self) -> None:
        return None


class Archive(dict[str, Value]):
    """numpy.savez: arrays by their names."""

    def entered(self) -> Archive:
        return self


def saved(where: Value, *arrays: Value, **named: Value) -> None:
    """numpy.savez(path, losses, positions=places)"""
    text = text_of(where)
    if text is not None and room.get() is None:
        held = {f"arr_{n}": each for n, each in enumerate(arrays)} | named
        disc.get({})[text if text.endswith(".npz") else f"{text}.npz"] = Archive(held)


def loaded(where: Value, *_: Value, **__: Value) -> Value:
    """numpy.load: what the script wrote there; of what it did not, nobody knows."""
    held = disc.get({}).get(text_of(where) or "")
    return held if isinstance(held, Archive) else UNKNOWN


def found(pattern: str) -> list[str]:
    """glob: one validation shard or three training shards, by the words of the pattern; else nothing."""
    other = room.get()
    if other is not None:
        return other.listed(pattern)
    own = sorted(each for each in disc.get({}) if fnmatch.fnmatchcase(each, pattern))
    if own:
        return own  # what the script wrote itself
    name = pattern.rpartition("/")[2]
    if not name.endswith(".bin") and "*" not in name:
        return [pattern]
    if _VAL.search(name):
        return [pattern.replace("*", "000000")]
    if "train" in name:
        return [pattern.replace("*", f"{n:06d}") for n in range(1, 4)]
    return []


def count_of(path: str) -> int:
    """The tokens of a shard; 0 for what is none."""
    name = path.rpartition("/")[2]
    if _is_text(name):
        return length.get()
    short = length.get() < DOCUMENT  # and so are windows
    return (FEWER if short else TRAIN) if "train" in name or name.endswith(".bin") else 0


def _is_text(name: str) -> bool:
    return bool(_VAL.search(name)) and "train" not in name


class Raw:
    """Bytes of a file: which, from where to where."""

    def __init__(self, text: str, start: int, stop: int) -> None:
        self.text = text
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __getitem__(self, index: Any) -> Value:
        if not isinstance(index, slice):
            return UNKNOWN
        first, last, _ = slice(index.start, index.stop).indices(len(self))
        return Raw(self.text, self.start + first, self.start + last)


def size_of(path: str) -> int | None:
    """The bytes of a shard; None for what is none."""
    count = count_of(path)
    return HEADER * 4 + 2 * count if count else None


def read(raw: Raw, width: int, count: int | None, offset: int, vocabulary: int) -> Value:
    """Integers of `width` bytes out of a shard: the header's, ids with their places, or the bytes that each stands for
    where the file's name says that it holds those."""
    held, scored = count_of(raw.text), _is_text(raw.text.rpartition("/")[2])
    if not held or width not in (2, 4):
        return UNKNOWN
    first = (raw.start + offset) // width
    last = raw.stop // width if count is None or count < 0 else min(first + count, raw.stop // width)
    if width == 2 and not scored and first >= 2 * HEADER:
        return Array(np.broadcast_to(np.uint16(5), (min(last, 2 * HEADER + held) - first,)))
    header = np.zeros(HEADER, np.int32)
    header[:3] = (MAGIC, 1, held)
    if width == 4:
        return Array(header[first:last])
    head = header.view(np.uint16)
    if scored and _SIDECAR.search(raw.text.rpartition("/")[2]):
        sizes = octets(tokens(vocabulary)[:held], vocabulary).true
        return Array(np.concatenate([head, [0], sizes])[first:last].astype(np.uint16))
    ids = tokens(vocabulary)[:held] if scored else np.full(held, 5, np.uint16)
    both = np.concatenate([head, ids])[first:last]
    if not scored:
        return Array(both)
    places = np.concatenate([np.full(len(head), -1, np.int32), np.arange(held, dtype=np.int32)])
    return Array(both, places[first:last])


__all__ = [
    "HEADER", "MAGIC", "Archive", "File", "Path", "Raw", "Room", "Scratch", "Stat", "count_of", "found", "loaded",
    "moved", "opened", "read", "room", "saved", "size_of", "text_of",
]  # fmt: skip
