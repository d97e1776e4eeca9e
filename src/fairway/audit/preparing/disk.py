"""The files of a preparation: documents wherever it reads, and what it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fairway.audit.preparing.documents import DOCUMENTS
from fairway.audit.trial.values import UNKNOWN, Value

_MADE = re.compile(r"\.(?:bin|npy|npz|pt|idx)$", re.I)  # what a preparation writes and asks for beforehand
_PARTED = re.compile(r"""split\(\s*(["'])((?:\\.|[^\\"'])+)\1""")
_ENDS = {
    r"\0": "\0",
    r"\x00": "\0",
    r"\n\n": "\n\n",
    r"\n\n\n": "\n\n\n",
    r"\x1e": "\x1e",
    "<|endoftext|>": "<|endoftext|>",
}
MOST = 4_000_000  # bytes of a file


class Disk:
    """lines: whether documents lie in lines of JSON where a file's name does not say it; end: what parts them else;
    asked: files of documents that were opened, and data sets that were loaded, by their names and parts."""

    def __init__(self, text: str) -> None:
        self.lines = "json.loads" in text
        self.end = next((_ENDS[found[2]] for found in _PARTED.finditer(text) if found[2] in _ENDS), "\n")
        self.written: dict[str, bytes | str] = {}
        self.asked: set[str] = set()

    def exists(self, path: str) -> bool:
        return path in self.written or not _MADE.search(path)

    def listed(self, pattern: str) -> list[str]:
        if "*" not in pattern:
            return [pattern]
        return [] if _MADE.search(pattern) else [pattern.replace("**/", "").replace("*", "documents")]

    def rows(self) -> list[dict[str, Value]]:
        return [{"text": each.text, "content": each.text, "id": each.code, "url": ""} for each in DOCUMENTS]

    def source(self, path: str) -> str:
        if self.lines and not path.endswith(".txt"):
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
        return self.end.join(each.text for each in DOCUMENTS) + self.end

    def open(self, path: str, mode: Value = "r") -> Value:
        kind = mode if isinstance(mode, str) else "r"
        if kind[:1] in ("w", "x"):
            self.written[path] = b"" if "b" in kind else ""
        if kind[:1] in ("w", "x", "a"):
            self.written.setdefault(path, b"" if "b" in kind else "")
            return Sink(self, path)
        held = self.written.get(path)
        if held is None:
            self.asked.add(path)
            text = self.source(path)
            held = text.encode() if "b" in kind else text
        return Source(held)

    def add(self, path: str, value: bytes | str) -> None:
        held: Any = self.written.get(path, type(value)())
        more: Any = value
        if type(held) is type(value) and len(held) < MOST:
            self.written[path] = held + more


class Source:
    """A file that is read."""

    def __init__(self, held: bytes | str) -> None:
        self.held: Any = held
        self.at = 0

    def entered(self) -> Source:
        return self

    def left(self, error: Value) -> bool:
        return False

    def read(self, count: Value = -1, *_: Value) -> Value:
        stop = self.at + count if isinstance(count, int) and count >= 0 else len(self.held)
        begun, self.at = self.at, stop
        return self.held[begun:stop]

    def __iter__(self) -> Iterator[Value]:
        return iter(self.held[self.at :].splitlines(keepends=True))

    def readlines(self, *_: Value) -> Value:
        return list(self)

    def readline(self, *_: Value) -> Value:
        line = next(iter(self), self.held[:0])
        self.at += len(line)
        return line

    def close(self) -> None:
        return None


class Sink:
    """A file that is written."""

    def __init__(self, disk: Disk, path: str) -> None:
        self.disk = disk
        self.path = path

    def entered(self) -> Sink:
        return self

    def left(self, error: Value) -> bool:
        return False

    def write(self, value: Value, *_: Value) -> Value:
        if isinstance(value, bytearray):
            value = bytes(value)
        if isinstance(value, (bytes, str)):
            self.disk.add(self.path, value)
            return len(value)
        return UNKNOWN

    def writelines(self, values: Value) -> None:
        for each in values:
            self.write(each)

    def tell(self) -> int:
        return len(self.disk.written.get(self.path, b""))

    def seek(self, *_: Value) -> Value:
        return UNKNOWN

    def close(self) -> None:
        return None

    flush = close


__all__ = ["Disk", "Sink", "Source"]
