"""Files that are either whole or absent: written beside their place, synced, then renamed onto it."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fairway.base.errors import DataError, FairwayError


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends well. A full disk (or a file-size limit) is a
    one-line error, and nothing is left behind."""
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise FairwayError(unwritable(path, error)) from error
    finally:
        if name and os.path.exists(name):
            os.unlink(name)


def unwritable(path: Path, error: OSError) -> str:
    """The one line that says why `path` could not be written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space" if full else "name a place that can be written"
    return f"{path}: could not be written: {error.strerror or error}; {remedy}"


def write(path: Path, content: bytes | str) -> None:
    """Writes a whole file atomically."""
    with atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    """The sha256 of a file's content; DataError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error


def read(path: Path) -> bytes:
    """A file's bytes; DataError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: {error.strerror or error}; name a file that can be read"
