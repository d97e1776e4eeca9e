"""Watching: a run's folder is only read, whatever state it is in, and drawn as text."""

import json
from pathlib import Path

import pytest

from fairway.base.journal import Run
from fairway.lab.watching import Watch, clock, frame, plot
from tests.lab.folders import STAGES, facts, lines, made_run, made_sweep


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run at step 30 of 60."""
    folder = made_run(tmp_path / "run", steps=30)
    (folder / "score.json").unlink()
    (folder / "artifact.fw").unlink()
    lines(folder / "journal.jsonl", facts("tiny", 1, STAGES)[:3])
    return folder


def test_a_running_run_shows_its_stage_step_rate_and_time_left(begun: Path) -> None:
    """30 of 60 steps of 512 tokens, ten a second: half is done in 3 s, and as long again is left."""
    watch = Watch(begun)
    view = watch.look()
    assert (view.stage, view.step, view.done, view.left) == ("training", 30, 0.5, 3.0)
    assert view.tokens_per_s == pytest.approx(5120)
    assert not view.finished
    drawn = frame(view, watch.curve, 80)
    assert "tiny, seed 1: training" in drawn
    assert "30 of 60 steps, 50 %" in drawn
    assert "3 s left" in drawn
    assert "3 of 120 s, 2.5 %" in drawn
    assert max(map(len, drawn.splitlines())) <= 80


def test_a_run_is_watched_while_another_process_holds_it(begun: Path) -> None:
    with Run(begun) as held:
        watch = Watch(begun)
        assert watch.look().step == 30
        held.point("train", 31, loss=2.0, scale=1.0, norm=1.0, seconds=3.1)
        with (begun / "curves.jsonl").open("a") as file:
            file.write('{"curve": "train", "step": 32, "lo')
        assert watch.look().step == 31


def test_a_finished_run_shows_its_scores_and_bytes(tmp_path: Path, fairway) -> None:
    answer = fairway("watch", made_run(tmp_path / "run"), "--once")
    assert (answer.code, answer.err) == (0, "")
    for words in ("tiny, seed 1: done", "adapted   1.9500 bits per byte", "110,000 of 120,000 bytes, 91.7 %"):
        assert words in answer.out


def test_a_sweep_shows_one_line_for_each_run(tmp_path: Path, fairway) -> None:
    folder = made_sweep(tmp_path / "sweep", {"base": 0.0, "other": 0.1}, (1, 2))
    (folder / "other-2-12" / "journal.jsonl").write_text("")
    answer = fairway("watch", folder, "--once")
    assert "3 of 4 runs have ended" in answer.out
    assert sum("bits per byte" in line for line in answer.out.splitlines()) == 3
    views = json.loads(fairway("watch", folder, "--json").out)
    assert [view["stage"] for view in views] == ["done", "done", "done", "not begun"]


def test_a_run_that_says_nothing_is_no_reason_to_fall(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "planned")
    assert "not begun" in frame(watch.look(), watch.curve, 80)
    folder = made_run(tmp_path / "run", steps=3)
    (folder / "recipe.toml").write_text("train = 3\nbudget = []\n")
    (folder / "journal.jsonl").write_text('{"fact": "train", "seconds": "long"}\n[3]\n{"fact": "score_float"}\n{"fac')
    watch = Watch(folder)
    assert "step" in frame(watch.look(), watch.curve, 80)


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, fairway) -> None:
    for place, says in ((tmp_path / "none", "no such folder"), (tmp_path, "no run folder")):
        answer = fairway("watch", place, "--once")
        assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
        assert says in answer.err


def test_a_plot_falls_from_the_upper_left_to_the_lower_right() -> None:
    """A straight line over 20 columns and 40 rows of dots: each letter on the diagonal holds its two columns' dots."""
    rows = plot([float(x) for x in range(20)], [float(-x) for x in range(20)], 10, 10)
    cells = [row[7:] for row in rows]
    assert [sum(cell != "⠀" for cell in row) for row in cells] == [1] * 10
    assert [next(at for at, cell in enumerate(row) if cell != "⠀") for row in cells] == list(range(10))
    assert rows[0].startswith("     0 ")
    assert rows[-1].startswith("   -19 ")
    assert len(plot([1.0, 1.0], [2.0, 2.0], 10, 4)) == 4  # a flat curve has no height to divide by


@pytest.mark.parametrize(("seconds", "says"), [(12, "12 s"), (185, "3:05 min"), (3750, "1:02:30 h")])
def test_time_is_told_as_people_tell_it(seconds: float, says: str) -> None:
    assert clock(seconds) == says
