"""The promise of the slot lab/sweep/engines: every job is run once, as many at a time as asked, each end is told, and
equal jobs give equal numbers wherever they run.

An engine offers `Spec` and `run(jobs, crew)`, an iterator of the Job that was started, an Ended, or None.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fairway.base.errors import RecipeError
from fairway.base.slots import kinds, technique
from fairway.lab.sweep.engines import Crew, crew_elsewhere, keep
from fairway.lab.sweep.one import Ended, Job
from tests.tiny.way import SAMPLE, TINY, run_tiny

FOLDER = "fairway.lab.sweep.engines"
PACKAGES = {"ray": "ray", "slurm": "submitit"}
SHORT = ("train.schedule.steps=8", "baselines=false", "proof_bytes=0", "score.result=quantized", "score.adapt=none")


def job(name: str) -> Job:
    return Job(name, Path("folder") / name, "cpu", 1, Path.cwd())


@dataclass
class Fake:
    """A run that ends when it was looked at `looks` times; `seen` holds what happened to all."""

    job: Job
    place: int
    seen: list[str]
    looks: int = 3
    stopped: bool = field(default=False, init=False)

    def poll(self) -> Ended | None:
        self.looks -= 1
        return None if self.looks > 0 else Ended(self.job.id, 1.0)

    def stop(self) -> None:
        self.seen.append(f"stop {self.job.id}")

    def kill(self) -> None:
        self.seen.append(f"kill {self.job.id}")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("fairway.lab.sweep.engines.PAUSE", 0.0)


def test_each_job_is_started_once_in_order_and_never_more_at_a_time_than_asked():
    started, ended, most, places = [], [], 0, []
    jobs = [job(name) for name in "abcde"]

    def start(one, place):
        places.append(place)
        return Fake(one, place, [], looks=2 + ord(one.id) % 3)

    for event in keep(jobs, 2, start):
        if isinstance(event, Job):
            started.append(event.id)
        elif isinstance(event, Ended):
            ended.append(event.id)
        most = max(most, len(started) - len(ended))
    assert started == list("abcde")
    assert sorted(ended) == started
    assert most == 2
    assert set(places) == {0, 1}


def test_of_equal_trainings_one_begins_when_the_other_has_ended():
    order = []
    jobs = [replace(job(name), training=training) for name, training in zip("abcd", ("x", "x", "y", ""), strict=True)]
    for event in keep(jobs, 3, lambda one, place: Fake(one, place, [], looks=3)):
        if event is not None:
            order.append(("begins " if isinstance(event, Job) else "ends ") + event.id)
    assert order[:3] == ["begins a", "begins c", "begins d"], "b waits, whoever can begin does"
    assert order.index("begins b") > order.index("ends a")
    assert len(order) == 8


def test_elsewhere_every_run_has_a_gpu_unless_it_is_to_run_on_a_cpu():
    assert crew_elsewhere(None, 5, "auto") == Crew(5, 1, ("any",) * 5)
    assert crew_elsewhere(2, 5, "cpu") == Crew(2, 1, ())
    with pytest.raises(RecipeError, match="--jobs 0"):
        crew_elsewhere(0, 5, "auto")


def test_whoever_goes_early_waits_for_the_checkpoints_of_those_on_their_way():
    seen: list[str] = []
    events = keep([job(name) for name in "abc"], 2, lambda one, place: Fake(one, place, seen))
    assert next(events) == job("a")
    assert next(events) == job("b")
    events.close()
    assert seen == ["stop a", "stop b"], "c was never started"


def test_who_does_not_want_to_wait_kills(monkeypatch):
    seen: list[str] = []

    def impatient(_: float) -> None:
        raise KeyboardInterrupt

    events = keep([job("a")], 1, lambda one, place: Fake(one, place, seen, looks=99))
    next(events)
    monkeypatch.setattr("fairway.lab.sweep.engines.time.sleep", impatient)
    with pytest.raises(KeyboardInterrupt):
        events.close()
    assert seen == ["stop a", "kill a"]


@pytest.mark.parametrize("kind", kinds(FOLDER))
def test_nothing_to_do_is_nothing_done(kind):
    if importlib.util.find_spec(PACKAGES.get(kind, "json")) is None:
        with pytest.raises(
            RecipeError, match=rf"--engine {kind}: needs the extra `{kind}`: pip install 'fairway\[{kind}\]'"
        ):
            next(iter(technique(FOLDER, kind).run([], Crew(1, 1))))
    else:
        assert list(technique(FOLDER, kind).run([], Crew(1, 1))) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(PACKAGES))
def test_an_engine_elsewhere_gives_the_same_numbers(kind, tmp_path):
    """Ray on this machine; submitit's local processes in the place of Slurm."""
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        pytest.skip(f"{PACKAGES[kind]} is not installed: pip install 'fairway[{kind}]'")
    (tmp_path / "one.toml").write_text(f'extends = "{TINY}"\n[data]\npath = "{SAMPLE}"\n')
    command = [sys.executable, "-m", "fairway", "sweep", str(tmp_path / "one.toml"), "--seeds", "1,2", "--json"]
    command += ["--engine", kind, "--out", str(tmp_path / "sweep"), "--device", "cpu", "--jobs", "2"]
    command += [word for override in SHORT for word in ("--set", override)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    for run in json.loads(done.stdout)["runs"]:
        outcome = run_tiny(tmp_path / f"alone-{run['seed']}", *SHORT, f"seed={run['seed']}", "name=one")
        assert run["bits_per_byte"] == outcome.bits_per_byte
