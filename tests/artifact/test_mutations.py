"""300 damaged and forged artifacts over all coders; bench/artifact_mutations.py makes 10,000 of them."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "artifact_mutations.py"


@pytest.fixture(scope="module")
def bench():  # type: ignore[no-untyped-def]
    found = importlib.util.spec_from_file_location("artifact_mutations", BENCH)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["artifact_mutations"] = module
    found.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_no_mutation_does_harm(bench, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Checksums untouched: all refused. Set right: refused, or weights; never another exception, seconds or memory."""
    tallies = bench.run(bench.cases(bench.originals(tmp_path), 300, seed=1), tmp_path)
    assert [(case.kind, case.coder, what) for tally in tallies.values() for case, what in tally.wrong] == []
    assert sum(tally.count for tally in tallies.values()) == 300
    assert all(tally.refused == tally.count for (_, honest), tally in tallies.items() if honest)
    assert sum(tally.other for tally in tallies.values()) > 0, "no forgery got through: they try nothing"
    assert tallies["repair", False].count > 10
    assert tallies["repair", False].other > 0, "no addend was forged"
    assert tallies["forms", False].count > 10
    assert tallies["forms", False].other > 0, "no form was forged"


def test_other_addends_are_other_weights(bench, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A digest of codes and scales alone would count a wrong addend as the same file."""
    digests = {one.coder: one.digest for one in bench.originals(tmp_path)}
    assert digests["plain"] != digests["plain, repair"]
    assert digests["plain"] != digests["plain, forms"]
    assert bench.FLOAT in digests
