"""What all tests share: one thread (small tensors are slower on several), the data folder where there is one, the tiny
run, and the command line."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from fairway.base.memory import keep_freed
from fairway.cli import main
from tests.tiny.way import run_tiny

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
keep_freed()
settings.register_profile("fairway", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fairway")  # a busy machine is no failure: drawing 9 inputs took a second beside two trainings


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real text and tokenizers for development: $FAIRWAY_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("FAIRWAY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set FAIRWAY_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole tiny run. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_tiny(folder)
    return folder


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str


@pytest.fixture
def fairway(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command line in this process: an exception that it should have caught fails the test."""

    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Answer(code, *capsys.readouterr())

    return call
