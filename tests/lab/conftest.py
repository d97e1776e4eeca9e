"""Two short runs of the tiny recipe that differ in the seed alone; tests that change one take a copy."""

from pathlib import Path

import pytest

from tests.tiny.way import run_tiny

SHORT = ("train.schedule.steps=25", "baselines=false", "proof_bytes=600")


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of run folders: tiny-1, tiny-2."""
    runs = tmp_path_factory.mktemp("record") / "runs"
    for seed in (1, 2):
        run_tiny(runs / f"tiny-{seed}", f"seed={seed}", *SHORT)
    return runs
