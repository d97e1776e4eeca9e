"""Shards while they are written: under hidden names until they are whole, continued from where the last checkpoint was.

An open shard is two hidden files, tokens and sidecar rows, that only grow. A checkpoint syncs them and notes how long
they are; what a killed build wrote after it is cut off again. A shard that is full keeps its hidden name until the
checkpoint that knows it is written, so that every file under a final name is whole.
"""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fairway.base.errors import DataError, FairwayError
from fairway.base.files import unwritable
from fairway.data.building import sidecar
from fairway.data.building.sidecar import BYTES, DECODED, START, Rows
from fairway.data.sources import shards
from fairway.data.splits import Uint16

MOST_SHARDS = 1_000_000  # names have six digits


@dataclass(frozen=True)
class Sealed:
    """A shard that is whole. documents: that begin in it; bytes, decoded_bytes: of these."""

    name: str
    tokens: int
    documents: int
    bytes: int
    decoded_bytes: int
    sha256: str
    documents_sha256: str


class Shards:
    """The shards of one split, in the order of its documents. columns: of the sidecar's rows."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, columns: int) -> None:
        self.folder, self.split, self.shard_tokens, self.columns = folder, split, shard_tokens, columns
        self.number = self.tokens = self.documents = 0  # of the open shard
        self.unnamed = list[Sealed]()  # whole, but under hidden names until the next checkpoint
        self._open: tuple[BinaryIO, BinaryIO] | None = None

    def state(self) -> dict[str, int]:
        """Where the open shard stands."""
        return {"number": self.number, "tokens": self.tokens, "documents": self.documents}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on from a checkpoint's state: what came after it is cut off. DataError where the files are shorter."""
        self.number, self.tokens, self.documents = state["number"], state["tokens"], state["documents"]
        if not self.tokens:
            return
        lengths = shards.HEADER_BYTES + 2 * self.tokens, sidecar.HEADER_BYTES + 8 * self.columns * self.documents
        for path, length in zip(self._hidden(self.number), lengths, strict=True):
            try:
                if path.stat().st_size < length:
                    raise DataError(f"{path}: shorter than its checkpoint says; remove the folder and build again")
                os.truncate(path, length)
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}; remove the folder and build again") from error

    def add(self, tokens: Uint16, rows: Rows) -> None:
        """Appends documents: their tokens one after another, and a row each, `start` counted from tokens[0]."""
        starts, done, told = rows[:, START].astype(np.int64), 0, 0
        while done < len(tokens):
            room = min(self.shard_tokens - self.tokens, len(tokens) - done)
            last = int(np.searchsorted(starts, done + room))
            begun = rows[told:last, : self.columns].copy()
            begun[:, START] = starts[told:last] - done + self.tokens
            self._append(tokens[done : done + room], begun)
            done, told = done + room, last
            if self.tokens == self.shard_tokens:
                self.seal()

    def seal(self) -> None:
        """Ends the open shard, if it holds anything."""
        if not self.tokens:
            return
        tokens, rows = self._files()
        try:
            for file, head in ((tokens, _header(self.tokens)), (rows, sidecar.header(self.documents, self.columns))):
                file.seek(0)
                file.write(head)
            self._sync()
        except OSError as error:
            raise FairwayError(unwritable(self.folder, error)) from error
        self._close()
        hidden = self._hidden(self.number)
        table = np.fromfile(hidden[1], dtype="<u8", offset=sidecar.HEADER_BYTES).reshape(-1, self.columns)
        original, decoded = (int(table[:, column].sum()) for column in (BYTES, DECODED))
        hashes = [_sha256(path) for path in hidden]
        self.unnamed.append(
            Sealed(self._name(self.number), self.tokens, self.documents, original, decoded, hashes[0], hashes[1])
        )
        self.number, self.tokens, self.documents = self.number + 1, 0, 0
        if self.number == MOST_SHARDS:
            raise DataError(f"{self.folder}: more than {MOST_SHARDS:,} shards; set --shard-tokens higher")

    def sync(self) -> None:
        """Brings what was written onto the disk, before a checkpoint counts on it."""
        if self._open is not None:
            try:
                self._sync()
            except OSError as error:
                raise FairwayError(unwritable(self.folder, error)) from error

    def close(self) -> None:
        """Lets go of the files, without ending the shard."""
        self._close()

    def _append(self, tokens: Uint16, rows: Rows) -> None:
        files = self._files()
        try:
            files[0].write(tokens.astype("<u2", copy=False).tobytes())
            files[1].write(rows.astype("<u8", copy=False).tobytes())
        except OSError as error:
            raise FairwayError(unwritable(self.folder, error)) from error
        self.tokens, self.documents = self.tokens + len(tokens), self.documents + len(rows)

    def _files(self) -> tuple[BinaryIO, BinaryIO]:
        if self._open is None:
            tokens, rows = self._hidden(self.number)
            try:
                self._open = _begun(tokens, not self.tokens), _begun(rows, not self.tokens)
            except OSError as error:
                raise FairwayError(unwritable(self.folder, error)) from error
        return self._open

    def _sync(self) -> None:
        for file in self._open or ():
            file.flush()
            os.fsync(file.fileno())

    def _close(self) -> None:
        for file in self._open or ():
            try:
                file.close()
            except OSError:  # a full disk, told already
                continue
        self._open = None

    def _name(self, number: int) -> str:
        return f"fineweb_{self.split}_{number:06}.bin"

    def _hidden(self, number: int) -> tuple[Path, Path]:
        path = self.folder / self._name(number)
        return hidden(path), hidden(sidecar.path_of(path))


def hidden(path: Path) -> Path:
    """Where a file stands until it is whole."""
    return path.with_name(f".{path.name}.open")


def give_names(folder: Path, sealed: list[dict[str, Any]]) -> None:
    """Gives whole shards their final names; those that have them already are left alone."""
    for row in sealed:
        for path in (sidecar.path_of(folder / row["name"]), folder / row["name"]):
            try:
                if hidden(path).exists():
                    os.replace(hidden(path), path)
                elif not path.exists():
                    raise DataError(f"{path}: is gone; remove the folder and build again")
            except OSError as error:
                raise FairwayError(unwritable(path, error)) from error


def plain(sealed: list[Sealed]) -> list[dict[str, Any]]:
    return [asdict(one) for one in sealed]


def _begun(path: Path, fresh: bool) -> BinaryIO:
    """An open shard's file, behind what it holds; or a fresh one, with room for its header."""
    file = path.open("w+b" if fresh else "r+b")
    if fresh:
        file.write(bytes(shards.HEADER_BYTES))
    file.seek(0, os.SEEK_END)
    return file


def _header(tokens: int) -> bytes:
    numbers = np.zeros(shards.HEADER_BYTES // 4, dtype="<i4")
    numbers[:3] = shards.MAGIC, shards.VERSION, tokens
    return numbers.tobytes()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
