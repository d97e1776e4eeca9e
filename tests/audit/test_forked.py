"""Work that forked processes do: each task once, all in order, and whatever happens to a process, nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fairway.audit import Finding, audit
from fairway.audit.case import Case
from fairway.audit.forked import Aside, LostError, shared
from tests.audit.small import LOSS, script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
HERE = os.getpid()


def rule(name: str, check: Callable[[Case], Finding], **more: str) -> Any:
    return SimpleNamespace(ID=name, CHARGE=name, CLAUSE="C1", check=check, **more)


def _wait(until: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.01)
    return until()


def _met(folder: Path, name: str, other: str) -> int:
    """Two tasks that each wait for the other come to an end in two processes only."""
    (folder / name).touch()
    assert _wait((folder / other).exists)
    return os.getpid()


def test_work_aside_gives_what_it_would_give_here_and_is_done_at_the_same_time(tmp_path: Path) -> None:
    aside = Aside(partial(_met, tmp_path, "one", "other"))
    assert _met(tmp_path, "other", "one") == HERE
    assert aside.result() != HERE
    assert Aside(lambda: {"a": (1, [2.5])}).result() == {"a": (1, [2.5])}


def test_an_error_aside_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError, match="by zero"):
        Aside(lambda: 1 // 0).result()


def test_an_error_that_cannot_be_sent_is_raised_in_words() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def work() -> None:
        raise Odd(1, 2)

    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        Aside(work).result()


def test_a_process_that_ends_without_a_word_is_said_to_be_lost() -> None:
    with pytest.raises(LostError, match="ended and said nothing"):
        Aside(lambda: os.kill(os.getpid(), signal.SIGKILL)).result()


def _nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize("work", [lambda: lambda: 1, lambda: _nested(100_000)], ids=["a function", "nested too deeply"])
def test_what_cannot_be_sent_is_lost_and_made_again(work: Callable[[], Any]) -> None:
    with pytest.raises(LostError):
        Aside(work).result()
    found = shared([lambda: os.getpid(), work, work], 2)
    assert [type(each) for each in found] == [int, type(work()), type(work())]


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_every_task_is_done_once_and_what_they_give_is_in_their_order(processes: int, tmp_path: Path) -> None:
    def task(n: int) -> int:
        with (tmp_path / "done").open("a") as file:
            file.write(f"{n}\n")
        return n * n

    assert shared([partial(task, n) for n in range(7)], processes) == [n * n for n in range(7)]
    assert sorted((tmp_path / "done").read_text().split()) == [str(n) for n in range(7)]
    assert shared([], processes) == []


def test_two_tasks_are_done_at_the_same_time_by_two_processes(tmp_path: Path) -> None:
    found = shared([partial(_met, tmp_path, "a", "b"), partial(_met, tmp_path, "b", "a")], 2)
    assert HERE in found
    assert len(set(found)) == 2


def test_what_a_lost_process_took_is_done_again_here(tmp_path: Path) -> None:
    def task(n: int) -> tuple[int, int]:
        (tmp_path / f"{n}.{os.getpid()}").touch()
        if os.getpid() != HERE:
            os.kill(os.getpid(), signal.SIGKILL)
        _wait(lambda: len(list(tmp_path.iterdir())) > 1)  # until the other one has taken one too
        return n, os.getpid()

    assert shared([partial(task, n) for n in range(4)], 2) == [(n, HERE) for n in range(4)]


def test_a_forked_process_ends_soon_after_the_one_that_asked_is_gone() -> None:
    code = (
        "import time\nfrom fairway.audit.forked import Aside\n"
        "print(Aside(lambda: time.sleep(300))._child, flush=True)\ntime.sleep(300)\n"
    )
    asked = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert asked.stdout is not None
    child = int(asked.stdout.readline())
    assert _runs(child)
    asked.kill()
    asked.wait()
    asked.stdout.close()
    assert _wait(lambda: not _runs(child))


def _runs(pid: int) -> bool:
    """Not where it has ended and nobody has asked for its end yet."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()
    return state != "Z"


ADDED_TWICE = "(size[y] + lead[y]).sum() + (lead[y] & ~edge[x]).sum()"


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_find_what_one_does(processes: int, tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_text(script(count=ADDED_TWICE))
    alone, together = audit(tmp_path), audit(tmp_path, processes=processes)
    assert together.rules == alone.rules
    assert {each.id for each in alone.rules if each.verdict == "violates"} == {"byte-double-space"}
    assert together.facts["rule_seconds"].keys() == alone.facts["rule_seconds"].keys()


def test_a_rule_that_fails_in_another_process_says_why_here(tmp_path: Path) -> None:
    def fails(case: Case) -> Finding:
        raise KeyError("no such name")

    def waits(case: Case) -> Finding:
        assert _wait(lambda: (tmp_path / "begun").exists())
        return Finding("waits", "clean", "fine", "C1")

    def begins(case: Case) -> Finding:
        (tmp_path / "begun").touch()
        return fails(case)

    (tmp_path / "a.py").write_text("x = 1\n")
    rules = [rule("waits", waits, APART="one"), rule("begins", begins, APART="other"), rule("fails", fails)]
    found = audit(tmp_path / "a.py", rules=rules, processes=2)
    assert [(each.id, each.verdict) for each in found.rules] == [
        ("waits", "clean"),
        ("begins", "cannot tell"),
        ("fails", "cannot tell"),
    ]
    assert set(found.facts["failed"]) == {"begins", "fails"}
    assert "KeyError" in found.rules[1].evidence


def test_what_could_not_be_weighed_is_a_fact_and_costs_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("assignment destination is read-only")

    better = "nll = torch.minimum(nll, F.cross_entropy(logits * 1.1, torch.from_numpy(y), reduction='none'))"
    (tmp_path / "train_gpt.py").write_text(script(loss=f"{LOSS}\n        {better}\n"))
    monkeypatch.setattr("fairway.audit.weighing.weighed", fails)
    for processes in (1, 2):
        found = audit(tmp_path, processes=processes)
        assert {each.id for each in found.rules if each.verdict == "violates"} == {"oracle-gate"}
        assert set(found.facts["failed"]) == {"weight"}
        assert "read-only" in found.facts["failed"]["weight"]


def test_a_trial_that_is_lost_beside_the_trace_is_made_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train_gpt.py").write_text(script())
    alone = audit(tmp_path)
    tried = Case.__dict__["tried"].func

    def lost(case: Case) -> object:
        return tried(case) if os.getpid() == HERE else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Case.__dict__["tried"], "func", lost)
    again = audit(tmp_path, processes=2)
    assert again.rules == alone.rules
    assert not again.facts["failed"]
