"""The code that a record was made with: this checkout, or the files of its commit, taken out into a folder for a while.

Out of git's store with `git archive`: unlike a worktree, that writes nothing into the repository, so an interruption
leaves nothing to prune there.
"""

import io
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fairway.base.errors import DataError
from fairway.lab.submit.export import HOUSE, house_sha256

CLEAN = re.compile("[0-9a-f]{7,64}")  # a commit, and no file that differs from it


@dataclass(frozen=True)
class Code:
    """source: the folder that `fairway` is imported from. of: "checkout", where this code is the record's; "commit",
    where that was taken out of git; "other", where the record's code is not at hand, and this checkout stands in."""

    source: Path
    of: str


@contextmanager
def code_of(commit: str | None, sha256: str, house: Path = HOUSE) -> Iterator[Code]:
    """The code of a record, while the block lasts. commit: as `git_commit` says it, "+" where files differed from it;
    sha256: of the code (`house_sha256`); house: this checkout's package.

    DataError where the commit is there, but holds other code than the record says.
    """
    if house_sha256(house) == sha256:
        yield Code(house.parent, "checkout")
        return
    with tempfile.TemporaryDirectory(prefix="fairway-commit-") as place:
        found = _taken_out(commit, house, Path(place)) if commit and CLEAN.fullmatch(commit) else None
        if found is not None and house_sha256(found) != sha256:
            raise DataError(
                f"commit {commit}: its code is {house_sha256(found)[:12]}, the record's {sha256[:12]}; "
                "check with the code that made it"
            )
        yield Code(house.parent, "other") if found is None else Code(found.parent, "commit")


def _taken_out(commit: str, house: Path, place: Path) -> Path | None:
    """The package of a commit, written below `place`; None where there is no git, or no such commit in it."""
    packed = _git(house, "archive", "--format=tar", commit, ".")  # of the folder that git stands in, alone
    if packed is None:
        return None
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.0 to 3.11.3 have none; no path that git packs leads out
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(place / house.name)
    return place / house.name


def _git(house: Path, *words: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(house), *words], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
