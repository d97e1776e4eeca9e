"""A file is whole or absent, whatever happens while it is written."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fairway.base import files
from fairway.base.errors import DataError, FairwayError, HonestyError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "a.fw"
    with files.atomic(path) as file:
        file.write(b"one")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"one"
    files.write(path, "zwei ä")
    assert files.read(path) == "zwei ä".encode()
    assert files.sha256(path) == hashlib.sha256("zwei ä".encode()).hexdigest()
    assert names(path.parent) == ["a.fw"]


@pytest.mark.parametrize("error", [HonestyError("false"), KeyboardInterrupt(), ValueError("x")])
def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.fw"
    files.write(path, b"old")
    with pytest.raises(type(error)), files.atomic(path) as file:  # noqa: PT012
        file.write(b"new, half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.fw"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.fw"
    files.write(path, b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from fairway.base import files\n"
        "with files.atomic(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(sys.platform == "win32", reason="no file-size limit there")
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from fairway.base import files\n"
        "from fairway.base.errors import FairwayError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: files.write(Path(sys.argv[1]), b'x' * 100_000)\n"
        "except FairwayError as error: print(type(error).__name__, error, sep=': ')\n"
    )
    path = tmp_path / "a.fw"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"FairwayError: {path}: could not be written: File too large; free some space\n"
    assert done.stderr == ""
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.fw", tmp_path):  # a file as folder; a folder as file
        with pytest.raises(FairwayError, match=r"could not be written: .*; name a place that can be written"):
            files.write(path, b"x")
    assert names(tmp_path) == ["file"]


def test_the_remedy_fits_the_error() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert files.unwritable(Path("a"), full).endswith("free some space")
    refused = OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert files.unwritable(Path("a"), refused).endswith("name a place that can be written")


def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    for read in (files.read, files.sha256):
        for path in (tmp_path / "absent", tmp_path):
            with pytest.raises(DataError, match=r"; name a file that can be read$"):
                read(path)
