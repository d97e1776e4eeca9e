"""One file: fetched part by part beside its place, checked by size and hash, then renamed onto it."""

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fairway.base.errors import DataError, FairwayError
from fairway.base.files import unwritable
from fairway.data.fetching.places import CHUNK, Passing, Place, Published

PARTS = ".fetching"  # the folder of what is not whole yet


class Ended(Exception):
    """The fetch was ended elsewhere: by another file's error, or by the person who watches."""


@dataclass(frozen=True)
class Patience:
    """How often, and how long apart, a file is tried again without a new byte; with one the count begins anew."""

    tries: int = 8
    first: float = 1.0  # seconds; doubled at each further try
    longest: float = 60.0  # seconds, unless the server asks for more
    most_asked: float = 900.0  # seconds; a server that asks for more is told to the person instead

    def wait(self, failures: int, asked: float | None) -> float:
        """Seconds before the next try, after so many failures on end."""
        own = min(self.longest, self.first * 2 ** (failures - 1))
        return own if asked is None else max(own, asked)


class Hashes:
    """The hashes that a published file is known by, of what has been read so far."""

    def __init__(self, file: Published) -> None:
        self.sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False) if file.git_sha1 else None

    def update(self, part: bytes) -> None:
        self.sha256.update(part)
        if self._git:
            self._git.update(part)

    def differs(self, file: Published) -> str:
        """What is wrong with the content, or nothing."""
        if file.sha256 and self.sha256.hexdigest() != file.sha256:
            return f"its sha256 is {self.sha256.hexdigest()[:16]}…, published is {file.sha256[:16]}…"
        if self._git and self._git.hexdigest() != file.git_sha1:
            return f"its git hash is {self._git.hexdigest()[:16]}…, published is {str(file.git_sha1)[:16]}…"
        return ""


def part_of(file: Published, folder: Path) -> Path:
    """What there is of a file before it is whole, named by its content: another revision never takes it up."""
    return folder / PARTS / f"{file.name}.{(file.sha256 or file.git_sha1 or str(file.bytes))[:16]}"


def matches(path: Path, file: Published, seen: Callable[[int], None]) -> str | None:
    """The sha256 of the file at `path` where it is what was published; None where it is not there, or other."""
    try:
        if path.stat().st_size != file.bytes:
            return None
        hashes = _hashed(path, file, seen)
    except OSError:
        return None
    return None if hashes.differs(file) else hashes.sha256.hexdigest()


def take(
    place: Place,
    file: Published,
    folder: Path,
    check: Callable[[Path, Published], None],
    patience: Patience,
    seen: Callable[[int], None],
    end: threading.Event,
) -> str:
    """Fetches one file into `folder` and returns its sha256. What an earlier call left of it is taken up.

    check: refuses content that is not what it should be; seen: is told of bytes as they come, less than 0 where some
    were in vain. DataError where size or hash are not as published, or the place stays silent.
    """
    part = part_of(file, folder)
    failures, spoilt, trouble = 0, False, ""
    while True:
        before = size_of(part)
        try:
            hashes = _append(place, file, part, seen, end)
        except Passing as passing:
            failures = 1 if size_of(part) > before else failures + 1
            trouble, wait = str(passing), patience.wait(failures, passing.wait)
            if failures >= patience.tries or wait > patience.most_asked:
                asked = f"; it asks for {wait:,.0f} s of rest" if wait > patience.most_asked else ""
                raise DataError(
                    f"{file.path}: given up after {failures} tries: {trouble}{asked}; call again, it goes on from here"
                ) from passing
            if end.wait(wait):
                raise Ended from None
            continue
        wrong = hashes.differs(file)
        if not wrong:
            break
        part.unlink(missing_ok=True)
        if spoilt:
            raise DataError(f"{file.path}: twice damaged on its way: {wrong}; fetch it from another mirror")
        spoilt = True  # once more, from the beginning: a proxy may have spoilt a part
        seen(-file.bytes)
    try:
        check(part, file)
    except FairwayError:
        part.unlink(missing_ok=True)
        raise
    _name(part, folder / file.name)
    return hashes.sha256.hexdigest()


def _append(place: Place, file: Published, part: Path, seen: Callable[[int], None], end: threading.Event) -> Hashes:
    """Reads what `part` lacks onto its end; the hashes of the whole."""
    try:
        if (have := size_of(part)) > file.bytes:
            part.unlink()
            have = 0
        hashes = _hashed(part, file, seen=lambda _: None) if have else Hashes(file)
        if have == file.bytes and part.exists():
            return hashes
        with part.open("ab") as out:
            for content in place.read(file, have):
                if end.is_set():
                    raise Ended
                if not content:  # the server begins anew
                    out.truncate(0)
                    seen(-have)
                    hashes, have = Hashes(file), 0
                have += len(content)
                if have > file.bytes:
                    out.truncate(0)
                    raise DataError(
                        f"{file.path}: more than the {file.bytes:,} bytes of the listing come; use another mirror"
                    )
                out.write(content)
                out.flush()  # a kill in this moment loses nothing that came
                hashes.update(content)
                seen(len(content))
            os.fsync(out.fileno())
    except OSError as error:
        raise FairwayError(unwritable(part, error)) from error
    if have < file.bytes:
        raise Passing(f"the connection ended after {have:,} of {file.bytes:,} bytes")
    return hashes


def _name(part: Path, target: Path) -> None:
    """Gives a checked file its own name."""
    try:
        os.replace(part, target)
        os.chmod(target, 0o644)
    except OSError as error:
        raise FairwayError(unwritable(target, error)) from error


def _hashed(path: Path, file: Published, seen: Callable[[int], None]) -> Hashes:
    hashes = Hashes(file)
    with path.open("rb") as content:
        while block := content.read(CHUNK):
            hashes.update(block)
            seen(len(block))
    return hashes


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
