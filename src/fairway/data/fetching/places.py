"""What a place offers from which files are fetched; and the plainest one, a local folder."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from fairway.base.errors import DataError
from fairway.data import packed

CHUNK = 1 << 20  # bytes handed on together


@dataclass(frozen=True)
class Published:
    """One published file.

    path: inside the repository; bytes: its size; sha256: of its content, where the place knows it; git_sha1: the
    content's name in git, which the hub gives for small files that it stores in git itself.
    """

    path: str
    bytes: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


class Passing(Exception):
    """A trouble that may pass: a dropped connection, too many requests. wait: seconds that the server asks for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Place(Protocol):
    """Where published files lie."""

    def describe(self) -> dict[str, str]:
        """What the receipt says of it."""
        ...

    def listing(self) -> list[Published]:
        """All files; DataError where there is no such place, Passing where a second try may help."""
        ...

    def read(self, file: Published, start: int) -> Iterator[bytes]:
        """The content from byte `start`, or from 0 after one empty part, in parts of any size; errors as `listing`."""
        ...


class Mirror:
    """A local folder, laid out like the repository or as an earlier fetch left it. hashes: those that its receipt
    states."""

    def __init__(self, folder: Path, receipt: str) -> None:
        self.folder, self.receipt = folder, receipt

    def describe(self) -> dict[str, str]:
        return {"folder": str(self.folder)}

    def listing(self) -> list[Published]:
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no folder; name one that holds the published files")
        hashes = {row["name"]: row["sha256"] for row in receipt_of(self.folder / self.receipt).get("files", [])}
        found = []
        for path in packed.files_of(self.folder):
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}; name a folder that can be read") from error
            found.append(Published(path.relative_to(self.folder).as_posix(), size, hashes.get(path.name)))
        return found

    def read(self, file: Published, start: int) -> Iterator[bytes]:
        path = self.folder / file.path
        try:
            with path.open("rb") as content:
                content.seek(start)
                while part := content.read(CHUNK):
                    yield part
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; name a folder that can be read") from error


def receipt_of(path: Path) -> dict[str, Any]:
    """What an earlier fetch wrote about its files; empty where there is nothing that can be read."""
    try:
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) and all("sha256" in row for row in content["files"]) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
