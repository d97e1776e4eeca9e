"""A sweep: every recipe with every seed, each run once, however often the sweep is killed and called again."""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import Run
from fairway.lab.sweep import Book, approaches, finished, folder_name, plan, read_plan
from fairway.lab.sweep.engines import crew
from fairway.lab.sweep.expecting import Expectation
from fairway.lab.sweep.one import Child, Ended, Job, run_one
from fairway.lab.sweep.showing import Progress
from fairway.lab.sweep.state import State, state_of
from fairway.recipe import find, load
from fairway.train.schedule import ScheduleSpec
from tests.lab.made import made_run
from tests.tiny.way import SAMPLE, TINY, run_tiny

SHORT = (
    "train.schedule.steps=25",
    "baselines=false",
    "proof_bytes=0",
    "score.result=quantized",
    "score.adapt=none",
)


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder with two recipes: the tiny one, and the same with another clip."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "plain.toml").write_text(f'extends = "{TINY}"\n[data]\npath = "{SAMPLE}"\n')
    (folder / "wide.toml").write_text('extends = "plain.toml"\n[model]\nhidden = 96\n')
    return folder


def planned(*sources, seeds=(1, 2), known=(), **keys):
    return plan(approaches([str(source) for source in sources], **keys), seeds, known)


# The plan.


def test_every_recipe_meets_every_seed_and_all_have_the_first_before_one_has_its_second(recipes):
    assert [(one.recipe, one.seed) for one, _ in planned(recipes)] == [
        *(("plain", 1), ("wide", 1)),
        *(("plain", 2), ("wide", 2)),
    ]


def test_an_id_stays_and_says_all_that_differs(recipes):
    ids = [one.id for one, _ in planned(recipes)]
    assert ids == [one.id for one, _ in planned(recipes)]
    assert len(set(ids)) == 4
    assert not set(ids) & {one.id for one, _ in planned(recipes, overrides=("train.clip=0.9",))}
    stated = planned(recipes, overrides=(f"train.clip={load(str(recipes / 'plain.toml')).train.clip}",))
    assert ids == [one.id for one, _ in stated], "the same value, said once more"


def test_what_is_resolved_is_the_recipe_with_that_seed(recipes):
    one, resolved = planned(recipes, overrides=("train.clip=0.9",))[1]
    assert resolved == load(str(recipes / "wide.toml"), ("train.clip=0.9", "seed=1"))
    assert (one.parent, one.folder) == ("plain", f"wide-1-{one.id}")


def test_the_proof_and_the_compressors_are_for_the_first_seed_alone(recipes):
    found = {(one.recipe, one.seed): (r.proof_bytes, r.baselines) for one, r in planned(recipes)}
    assert found["wide", 1] == found["plain", 1] == (300, True)
    assert found["wide", 2] == found["plain", 2] == (0, False)


def test_more_seeds_and_recipes_extend_a_plan_whichever_is_named_first(recipes):
    before = [one for one, _ in planned(recipes, seeds=(1,))]
    after = planned(recipes, seeds=(7, 1), known=before)
    assert {one.id for one in before} < {one.id for one, _ in after}
    assert {r.proof_bytes for one, r in after if one.seed == 7} == {0}, "seed 1 was the first, and stays it"
    (recipes / "new.toml").write_text('extends = "plain.toml"\n[model]\nhidden = 48\n')
    new = [(one.seed, r.proof_bytes) for one, r in planned(recipes, seeds=(7, 1), known=before) if one.recipe == "new"]
    assert new == [(7, 300), (1, 0)]


def test_without_seeds_each_recipe_has_its_own(recipes):
    (recipes / "wide.toml").write_text('extends = "plain.toml"\nseed = 5\n')
    assert [one.seed for one, _ in planned(recipes, seeds=())] == [1337, 5]


def test_the_folder_approaches_takes_b_and_b6_along_as_baselines(tmp_path):
    home = find("b6").parent
    (tmp_path / "approaches").mkdir()
    for name in ("b.toml", "b6.toml"):
        (tmp_path / name).write_bytes((home / name).read_bytes())
    (tmp_path / "approaches" / "a.toml").write_text('extends = "../b6.toml"\n[model]\nmlp = "swiglu"\n')
    found = [(one.recipe, one.baseline, one.parent) for one, _ in planned(tmp_path / "approaches", seeds=(1,))]
    assert found == [("b", True, None), ("b6", True, "b"), ("a", False, "b6")]


def test_recipes_named_beside_a_folder_are_baselines_and_of_recipes_alone_the_first(recipes, tmp_path):
    (tmp_path / "base.toml").write_text((recipes / "plain.toml").read_text())
    assert [a.baseline for a in approaches([str(recipes), str(tmp_path / "base.toml")])] == [True, False, False]
    files = [str(recipes / "wide.toml"), str(recipes / "plain.toml")]
    assert [(a.recipe.name, a.baseline) for a in approaches(files)] == [("wide", True), ("plain", False)]
    assert folder_name(files, form="") == "sweep-wide-plain"
    assert folder_name([str(recipes), str(tmp_path / "base.toml")], form="pocket") == "sweep-small-pocket"


def test_two_recipes_of_one_name_are_refused(recipes, tmp_path):
    (tmp_path / "plain.toml").write_text((recipes / "wide.toml").read_text().replace("plain", "small/plain"))
    with pytest.raises(RecipeError, match=r"called 'plain', as .* is; give one another `name`"):
        approaches([str(recipes), str(tmp_path / "plain.toml")])


# Bad input: one line, exit code 2 (or 1 where files are wrong), and nothing made.


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("no-such-folder",), 2, "recipe 'no-such-folder': no such file and no such name"),
        (("EMPTY",), 2, "no recipe (.toml) in this folder"),
        (("RECIPES", "--engine", "cloud"), 2, "--engine = 'cloud': no such technique; choices: local, ray, slurm"),
        (("RECIPES", "--jobs", "0"), 2, "--jobs 0: at least 1"),
        (("RECIPES", "--jobs", "-3"), 2, "--jobs -3: at least 1"),
        (("RECIPES", "--seeds", "1,x"), 2, "--seeds 1,x: whole numbers"),
        (("RECIPES", "--pocket"), 2, "extends neither b6.toml nor b.toml"),
        (("RECIPES", "--pocket", "--wiki"), 2, "--pocket --wiki: one small form at a time"),
        (("RECIPES", "--set", "train.clap=1"), 2, "train.clap: unknown key"),
        (("RECIPES", "--device", "abacus"), 2, "--device abacus: choices"),
    ],
)
def test_a_wrong_call_is_one_line_and_makes_nothing(fairway, recipes, tmp_path, arguments, code, says):
    (tmp_path / "empty").mkdir()
    places = {"RECIPES": recipes, "EMPTY": tmp_path / "empty"}
    answer = fairway("sweep", *(places.get(word, word) for word in arguments), "--runs", tmp_path / "runs")
    assert (answer.code, answer.err.count("\n"), answer.out) == (code, 1, "")
    assert says in answer.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("line", ['{"id": "ab', '{"name": "someone else\'s"}', "[1, 2]", '{"id": 3}'])
def test_a_plan_that_is_torn_or_foreign_is_refused_with_its_line(fairway, recipes, tmp_path, line):
    with Book(tmp_path / "sweep") as book:
        book.extend([one for one, _ in planned(recipes)])
    with (tmp_path / "sweep" / "plan.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match="line 5 is no run of a plan; delete the file"):
        read_plan(tmp_path / "sweep")
    answer = fairway("sweep", recipes, "--out", tmp_path / "sweep")
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == [".lock", "plan.jsonl"]


def test_two_sweeps_at_once_in_one_folder_are_refused(fairway, recipes, tmp_path):
    with Book(tmp_path / "sweep"):
        answer = fairway("sweep", recipes, "--out", tmp_path / "sweep")
    assert answer.code == 2
    assert "sweep folder" in answer.err
    assert "in use by another process; wait for it, or name another folder with --out" in answer.err


def test_more_runs_at_once_than_gpus_are_refused():
    assert crew(None, ("0", "1")).width == 2
    with pytest.raises(RecipeError, match="--jobs 3: 2 GPUs here"):
        crew(3, ("0", "1"))


def test_a_plan_is_shown_and_nothing_is_run(fairway, recipes, tmp_path):
    answer = fairway("sweep", recipes, "--seeds", "1,2", "--plan", "--runs", tmp_path / "runs", "--json")
    shown = json.loads(answer.out)
    assert [(row["recipe"], row["seed"]) for row in shown["runs"]] == [
        ("plain", 1),
        ("wide", 1),
        ("plain", 2),
        ("wide", 2),
    ]
    assert {row["recipe"]: row["parameters"] for row in shown["runs"]}["plain"] == 38_730
    assert shown["runs"][0]["expected_seconds"] is None
    assert not (tmp_path / "runs").exists()
    assert "4 runs, 4 of them to be made" in fairway("sweep", recipes, "--seeds", "1,2", "--plan").out


def test_a_run_folder_that_holds_another_recipe_is_booked_as_failed_and_left_alone(fairway, recipes, tmp_path):
    (tmp_path / "sweep").mkdir()
    ((one, _),) = planned(recipes / "plain.toml", seeds=(1,))
    (tmp_path / "sweep" / one.folder).mkdir()
    (tmp_path / "sweep" / one.folder / "recipe.toml").write_text("seed = 1\n")
    answer = fairway("sweep", recipes / "plain.toml", "--seeds", "1", "--out", tmp_path / "sweep")
    assert answer.code == 1
    assert "holds another recipe, or one from another version; remove the folder to start anew" in answer.err
    assert sorted(path.name for path in (tmp_path / "sweep" / one.folder).iterdir()) == ["recipe.toml"]


# What is shown.


def test_a_run_on_its_way_says_its_stage_its_step_and_the_time_left(tmp_path):
    schedule = ScheduleSpec(steps=40)
    assert state_of(tmp_path / "run", schedule) == State("start")
    with Run(tmp_path / "run") as run:
        run.fact("run", recipe="x")
        assert state_of(tmp_path / "run", schedule).stage == "text"
        run.fact("prepare", seconds=1.0)
        for step in range(1, 11):
            run.point("train", step, loss=5.0 - step / 10, scale=1.0, seconds=step * 0.5)
        with (tmp_path / "run" / "curves.jsonl").open("a") as torn:
            torn.write('{"curve": "tr')
        assert state_of(tmp_path / "run", schedule) == State("train", 0.25, 10, 4.0, 15.0)
        run.fact("train", seconds=20.0)
        run.fact("score_float", bits_per_byte=4.0)
        assert state_of(tmp_path / "run", schedule) == State("scored float")


def test_a_terminal_shows_each_run_and_the_time_left_for_all(recipes, tmp_path):
    runs = planned(recipes)
    known = runs[0][0]
    facts = [{"fact": "started", "id": known.id}, {"fact": "finished", "id": known.id, "seconds": 100.0}]
    progress = Progress(runs, tmp_path, Expectation(tmp_path, runs, facts), width=2)
    for one, _ in runs[:2]:
        progress.started(one.id)
    with Run(tmp_path / runs[0][0].folder) as run:
        run.fact("prepare", seconds=1.0)
        run.point("train", 30, loss=4.25, scale=1.0, seconds=3.0)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(progress.table())
    shown = console.export_text()
    assert "plain  seed 1  train  30/60  loss 4.250  100 s left" in " ".join(shown.split("\n")).replace("   ", "  ")
    assert "0 of 4 runs ended, 3 min left" in shown
    line = progress.finished(Ended(runs[1][0].id, 40.0), 30.0, 3.5)
    assert line == "1/4     wide, seed 1: 3.5000 bits per byte (40 s; 2 min left)"
    assert progress.failed(Ended(runs[0][0].id, 3.0, "no memory")).startswith(
        "2/4     plain, seed 1: failed: no memory (3 s; "
    )


def test_the_time_left_counts_a_training_that_several_runs_share_once(recipes, tmp_path):
    (recipes / "coarse.toml").write_text('extends = "plain.toml"\n[quant.matrix]\nbits = 4\n')
    runs = planned(recipes)
    id_of = {(one.recipe, one.seed): one.id for one, _ in runs}
    expectation = Expectation(tmp_path, runs, [])
    assert expectation.seconds() == {}, "nothing is known yet"
    expectation.end(id_of["coarse", 1], 100.0, 70.0)
    assert expectation.seconds() == {
        id_of["plain", 1]: 30.0,  # which takes the weights
        id_of["wide", 1]: 100.0,
        id_of["coarse", 2]: 100.0,
        id_of["plain", 2]: 30.0,
        id_of["wide", 2]: 100.0,
    }
    expectation.end(id_of["wide", 1], 210.0, 150.0)
    expectation.end(id_of["plain", 2], 5.0, None)
    found = expectation.seconds()
    assert found[id_of["wide", 2]] == 210.0, "its own recipe's seconds before the others'"
    assert id_of["plain", 2] not in found


def test_a_run_that_went_on_from_a_checkpoint_teaches_no_time(recipes, tmp_path):
    runs = planned(recipes, seeds=(1,))
    plain, _ = runs[0]
    expectation = Expectation(tmp_path, runs, [{"fact": "started", "id": plain.id}])
    expectation.end(plain.id, 20.0, 70.0)
    assert expectation.seconds() == {}
    twice = [{"fact": what, "id": plain.id, "seconds": 20.0} for what in ("started", "started", "finished")]
    assert Expectation(tmp_path, runs, twice).seconds() == {}


# The runs themselves.


def sweep_process(recipes, folder, *arguments):
    """The sweep as a person starts it."""
    command = [sys.executable, "-m", "fairway", "sweep", recipes, "--out", folder, "--device", "cpu", *settings()]
    return subprocess.Popen(
        [*map(str, command), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def settings():
    return [word for override in SHORT for word in ("--set", override)]


def facts(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=600.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def contents(folder):
    """{file: (when it was written, hash)} of a finished run, without its lock."""
    listed = [path for path in folder.iterdir() if path.name != ".lock"]
    return {path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in listed}


def at_rest(folder):
    """Its contents when nobody writes any more: the run of a sweep that was killed may have had a last word to say."""
    before = contents(folder)
    while True:
        time.sleep(0.5)
        now = contents(folder)
        if now == before:
            return now
        before = now


@pytest.mark.slow
def test_a_sweep_killed_twice_loses_nothing_repeats_nothing_and_gives_the_same_bits(recipes, tmp_path, fairway):
    folder, chance, plain = tmp_path / "sweep", random.Random(), recipes / "plain.toml"

    def killed_in_training(count):
        """A sweep, killed while its run number `count` trains or a little later: at a random moment."""
        process = sweep_process(plain, folder, "--seeds", "1,2", "--jobs", "1")
        wait_for(lambda: len(list(folder.glob("*/curves.jsonl"))) >= count)
        time.sleep(chance.uniform(0.0, 2.0))
        process.kill()
        process.communicate()

    killed_in_training(1)
    killed_in_training(2)
    done = {one.folder: at_rest(folder / one.folder) for one in read_plan(folder) if finished(folder, one)}
    third = sweep_process(plain, folder, "--seeds", "1,2", "--jobs", "1")
    said, _ = third.communicate(timeout=600)
    assert third.returncode == 0, said

    runs = read_plan(folder)
    assert [one.seed for one in runs] == [1, 2]
    for one in runs:
        journal = [row["fact"] for row in facts(folder / one.folder / "journal.jsonl")]
        assert journal.count("train") == journal.count("done") == 1, "trained once, and ended once"
        assert not (folder / one.folder / "checkpoint.pt").exists()
    assert done, "the first was finished when the second trained"
    for name, before in done.items():
        assert contents(folder / name) == before, "a finished run is not touched"
    booked = [row["id"] for row in facts(folder / "sweep.jsonl") if row["fact"] == "finished"]
    assert sorted(booked) == sorted(one.id for one in runs)
    assert not (folder / "latest").exists()

    for one in runs:
        outcome = run_tiny(tmp_path / f"alone-{one.seed}", *SHORT, f"seed={one.seed}", "name=plain")
        swept = finished(folder, one)
        assert swept["bits_per_byte"] == outcome.bits_per_byte, "the number of `fairway run`, to the bit"
        assert swept["artifact_sha256"] == outcome.artifact_sha256
        assert swept["recipe_sha256"] == outcome.recipe_sha256 == one.sha256

    kept = {one.folder: contents(folder / one.folder) for one in runs}
    again = fairway("sweep", plain, "--out", folder, "--seeds", "2,1", *settings(), "--json")
    assert again.code == 0
    assert [run["bits_per_byte"] for run in json.loads(again.out)["runs"]] == [
        finished(folder, one)["bits_per_byte"] for one in reversed(runs)
    ]
    assert kept == {one.folder: contents(folder / one.folder) for one in runs}, "all are finished: nothing was run"

    # The process of a sweep that was killed may end its run while the next sweep's process waits for the folder.
    late = run_one(Job(runs[0].id, folder / runs[0].folder, "cpu", 1, tmp_path))
    assert not late.error
    assert kept == {one.folder: contents(folder / one.folder) for one in runs}, "it is not ended twice"


def test_a_sweep_ends_with_the_comparison_of_its_approaches(fairway, recipes, tmp_path):
    for one, _ in planned(recipes):
        hidden, score = ("model.hidden=96", 1.6) if one.recipe == "wide" else ("model.hidden=64", 1.5)
        made_run(tmp_path / "sweep" / one.folder, one.seed, score + one.seed / 100, hidden, name=one.recipe)
    answer = fairway("sweep", recipes, "--seeds", "1,2", "--out", tmp_path / "sweep")
    assert answer.code == 0, answer.err
    assert "4 of 4 runs are finished already" in answer.err
    assert "plain 1.5150 ± 0.0071 2 of 2 seeds" in " ".join(answer.out.split())
    assert "wide worse 2 1.6150 ± 0.0071" in " ".join(answer.out.split())
    assert "against plain" in answer.out


def test_a_process_that_has_ended_says_so_as_often_as_it_is_asked(tmp_path):
    """A sweep that is stopped asks all its runs again and again until the last has ended."""
    child = Child(Job("x", tmp_path / "empty", "cpu", 1, tmp_path))
    wait_for(lambda: child.poll() is not None, 60.0)
    assert child.poll() is child.poll()
    assert "recipe.toml is missing" in child.poll().error


def test_a_run_that_fails_is_booked_and_the_others_go_on(fairway, recipes, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (recipes / "first.toml").write_text('extends = "plain.toml"\n[data]\npath = "nowhere.txt"\n')
    (recipes / "wide.toml").unlink()
    answer = fairway("sweep", recipes, "--seeds", "1", "--runs", tmp_path / "runs", "--device", "cpu", *settings())
    folder = tmp_path / "runs" / "sweep-small"
    assert answer.code == 1
    bad, good = read_plan(folder)
    score = finished(folder, good)
    assert score is not None
    assert finished(folder, bad) is None
    last = {row["id"]: row for row in facts(folder / "sweep.jsonl")}
    assert last[good.id]["fact"] == "finished"
    assert last[good.id]["bits_per_byte"] == score["bits_per_byte"]
    assert last[bad.id]["fact"] == "failed"
    assert last[bad.id]["error"].startswith("DataError: ")
    assert "nowhere.txt" in last[bad.id]["error"]
    assert "1 of 2 runs failed: first seed 1; why stands above" in answer.err
    assert "Traceback" not in answer.err
    assert f"plain {score['bits_per_byte']:.4f} 1 of 1 seeds" in " ".join(answer.out.split())
    assert not (tmp_path / "runs" / "latest").exists()
