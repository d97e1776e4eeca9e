"""--log: a copy of points and facts for those who live elsewhere, asked for and checked before anything begins."""

import json
import sys
from pathlib import Path

import pytest

from fairway.base.errors import RecipeError
from fairway.base.ranks import Ranks
from fairway.lab.logs import LoggedRun, check
from tests.tiny.way import SAMPLE, TINY

POINTS = {1: 4.0, 2: 3.0, 3: 2.5}


def write(folder: Path, kind: str) -> None:
    with LoggedRun(folder, Ranks(), True, None, kind) as run:
        run.fact("run", recipe="tiny", place=Path("x"))
        for step, loss in POINTS.items():
            run.point("train", step, loss=loss, norm=1.0)
        run.fact("score_float", bits_per_byte=2.25)


def test_tensorboard_holds_what_curves_and_journal_hold(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == POINTS
    assert [(event.step, event.value) for event in events.Scalars("bits_per_byte/float")] == [(3, 2.25)]
    assert set(events.Tags()["tensors"]) == {"run/text_summary", "score_float/text_summary"}
    rows = [json.loads(row) for row in (tmp_path / "run" / "curves.jsonl").read_text().splitlines()]
    assert {row["step"]: row["loss"] for row in rows} == POINTS


def test_the_runs_of_a_sweep_are_logged_each_in_its_folder(tmp_path: Path, monkeypatch, fairway) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ["--set", f"data.path={SAMPLE}", "--set", "train.schedule.steps=2"]
    answer = fairway(
        "sweep", TINY, *settings, "--seeds", "1,2", "--out", tmp_path, "--device", "cpu", "--log", "tensorboard"
    )
    assert answer.code == 0, answer.err
    assert len(list(tmp_path.glob("*/tensorboard/events.*"))) == 2


def test_wandb_stays_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    write(tmp_path / "run", "wandb")
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_extra_is_one_line_before_a_run_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fairway, kind: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == kind or name == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    for verb in ("run", "train", "sweep"):
        answer = fairway(verb, TINY, "--set", f"data.path={SAMPLE}", "--runs", tmp_path / "runs", "--log", kind)
        assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1), answer.err
        assert f"pip install 'fairway[{kind}]'" in answer.err
        assert not (tmp_path / "runs").exists()


def test_an_unknown_log_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match="choices: tensorboard, wandb"):
        check("../tensorboard")
