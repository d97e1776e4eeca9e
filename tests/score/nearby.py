"""Decoding a proof's file in this process: another takes three seconds to start, and a few tests really start one."""

import contextlib
import io
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fairway.cli import main
from fairway.score import proof


@dataclass(frozen=True)
class Given:
    """What the decoding process was given: its command, the folder it began in, and the files there."""

    command: list[str]
    folder: Path
    files: dict[str, bytes]


def watch(monkeypatch: pytest.MonkeyPatch, here: bool = True) -> list[Given]:
    """Notes what every decoding process is given; `here`: and runs its command line in this process."""
    given: list[Given] = []

    def run(command: list[str], cwd: Path, env: dict[str, str], **more: Any) -> Any:
        given.append(Given(command, cwd, {path.name: path.read_bytes() for path in cwd.iterdir()}))
        if not here:
            return subprocess.run(command, cwd=cwd, env=env, **more)
        said, code, handler = io.StringIO(), 0, signal.getsignal(signal.SIGTERM)
        with contextlib.chdir(cwd), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                main(command[3:])
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(command, code, None, said.getvalue().encode())

    monkeypatch.setattr(proof, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL))
    return given
