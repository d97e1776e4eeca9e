"""Two gloo processes, started as torchrun starts them, do what one does, and end together."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.tiny.way import SAMPLE, TINY, run_tiny

STEPS = "train.schedule.steps=20"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fairway"]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun with gloo is tried on POSIX")


def two(*arguments):
    """(exit code, standard output, standard error) of two ranks; a hang is a failure."""
    done = subprocess.run(
        [*TORCHRUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "curves.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of the same 20 steps by one rank and by two, and what the two printed."""
    place = tmp_path_factory.mktemp("ranks")
    run_tiny(place / "one", STEPS, "baselines=false")
    values = [part for value in (f"data.path={SAMPLE}", STEPS, "baselines=false") for part in ("--set", value)]
    code, out, err = two("run", TINY, *values, "--runs", place / "runs", "--device", "cpu", "--json")
    assert code == 0, err
    (folder,) = (path for path in (place / "runs").iterdir() if path.name != "latest")
    assert (place / "runs" / "latest").resolve() == folder.resolve()
    return place / "one", folder, out


def test_two_ranks_train_to_the_loss_of_one(both):
    """Within 1e-4 nats at every one of 20 steps: half a batch each, gradients summed."""
    one, folder, _ = both
    assert len(losses(folder)) == 20
    assert losses(folder) == pytest.approx(losses(one), abs=1e-4)
    facts = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert next(fact for fact in facts if fact["fact"] == "device")["ranks"] == 2
    assert [fact["fact"] for fact in facts].count("train") == 1, "the first rank writes, alone"


def test_two_ranks_print_one_score_and_leave_one_folder(both):
    _, folder, out = both
    assert json.loads(out) == json.loads((folder / "score.json").read_text())
    assert {"checkpoint.pt"}.isdisjoint(path.name for path in folder.iterdir())


def test_two_ranks_score_a_file_as_one_does(both, fairway, tmp_path):
    """The adapted score of the same artifact within 1e-6 bits per byte; so are the other stages."""
    _, folder, _ = both
    copy = shutil.copytree(folder, tmp_path / "run")
    journal = copy / "journal.jsonl"  # without the booked scores, which a single rank would take up
    kept = [line for line in journal.read_text().splitlines() if '"fact": "score_' not in line]
    journal.write_text("\n".join(kept) + "\n")
    one = json.loads(fairway("score", copy, "--json", "--device", "cpu").out)
    code, out, err = two("score", copy, "--json", "--device", "cpu")
    assert code == 0, err
    by_two = json.loads(out)
    assert by_two["artifact_sha256"] == one["artifact_sha256"]
    assert by_two["stages"] == pytest.approx(one["stages"], abs=1e-6)
    assert by_two["bits_per_byte"] == by_two["stages"]["adapted"]


def test_a_budget_is_the_same_verdict_on_both_ranks_and_neither_hangs(tmp_path):
    values = [f"data.path={SAMPLE}", "train.schedule.steps=2", "baselines=false", "budget.artifact_bytes=99"]
    overrides = [part for value in values for part in ("--set", value)]
    code, out, err = two("run", TINY, *overrides, "--runs", tmp_path, "--device", "cpu", "--json")
    assert code == 1
    assert out == ""
    assert err.count("BudgetError: artifact + code: ") >= 1
    assert "SIGABRT" not in err
    assert "verbs/" not in err, "no traceback of ours beside torchrun's own"
    assert not list(tmp_path.glob("*/artifact.fw"))
