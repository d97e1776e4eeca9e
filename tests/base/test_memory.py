"""Freed memory is kept, and used again."""

import ctypes
import os
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from fairway.base.memory import keep_freed
import numpy
kept = keep_freed() if sys.argv[1] == "kept" else None
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    held = [numpy.ones(2**17 * size) for size in (*range(1, 17), 40)]  # MiB: a layer's activations, and logits
    del held
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    """(what `keep_freed` said, pages that the system handed out for 20 steps that hold 176 MiB each)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True, env={**clean, **environment}
    )
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the C library of GNU"
)
def test_a_step_finds_the_pages_of_the_step_before() -> None:
    said, kept = faults("kept")
    assert said == "True"
    assert 5 * kept < faults("given back")[1]


def test_who_tunes_the_allocator_is_left_alone() -> None:
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
