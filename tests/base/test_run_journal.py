"""The run folder: append-only facts that survive a kill, one process at a time, and nothing at all in memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fairway.base.errors import FairwayError, RecipeError
from fairway.base.folders import new_folder, point_latest
from fairway.base.journal import Run
from fairway.base.ranks import Ranks


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_facts_are_appended_and_the_last_one_answers(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run:
        run.fact("weights", bytes=1)
        run.fact("weights", bytes=2)
        run.point("loss", 3, value=0.5)
    assert [row["bytes"] for row in rows(tmp_path / "r" / "journal.jsonl")] == [1, 2]
    assert rows(tmp_path / "r" / "curves.jsonl") == [{"curve": "loss", "step": 3, "value": 0.5}]
    with Run(tmp_path / "r") as again:
        assert again.facts == {"weights": {"bytes": 2}}  # the same as in the run that wrote it
        again.fact("weights", bytes=3)
    assert [row["bytes"] for row in rows(tmp_path / "r" / "journal.jsonl")] == [1, 2, 3]


def test_two_processes_cannot_have_one_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fairway.base.journal import Run; Run(Path(sys.argv[1]))"
    with Run(tmp_path):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
        assert "RecipeError" in other.stderr
        assert f"run folder {tmp_path}: in use by another process" in other.stderr
        with pytest.raises(RecipeError, match="in use"):
            Run(tmp_path)
    Run(tmp_path).close()  # free again


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fairway.base.journal import Run\n"
        "run = Run(Path(sys.argv[1])); run.fact('held', yes=1); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match="in use"):
            Run(tmp_path)
        other.kill()
    with Run(tmp_path) as run:
        assert run.facts == {"held": {"yes": 1}}


@pytest.mark.parametrize("torn", [b'{"fact": "b", "val', b"17", b"\xff\xfe", b'{"fact": "b", "s": "\xc3'])
def test_a_line_torn_by_a_kill_loses_itself_alone(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"fact": "a", "value": 1}\n' + torn)
    with Run(tmp_path) as run:
        assert run.facts == {"a": {"value": 1}}
        run.fact("c", value=3)  # must not continue the torn line
    with Run(tmp_path) as run:
        assert run.facts == {"a": {"value": 1}, "c": {"value": 3}}
    assert path.read_bytes().startswith(b'{"fact": "a", "value": 1}\n' + torn)  # nothing written is ever taken back


def test_a_run_in_memory_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Run() as run:
        run.fact("a", value=1)
        run.point("loss", 1, value=2.0)
        assert run.facts == {"a": {"value": 1}}
        assert not run.writes
        with pytest.raises(RecipeError, match="no folder"):
            run.path("artifact.fw")
    assert list(tmp_path.iterdir()) == []


def test_ranks_beyond_the_first_write_nothing_and_need_no_lock(tmp_path: Path) -> None:
    with Run(tmp_path / "r", Ranks(0, 2)) as first, Run(tmp_path / "r", Ranks(1, 2), quiet=False) as second:
        second.fact("mine", value=1)
        assert second.quiet
        first.fact("ours", value=1)
    assert [row["fact"] for row in rows(tmp_path / "r" / "journal.jsonl")] == ["ours"]


def test_a_fact_may_hold_paths_and_numbers_of_numpy(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        run.fact("f", path=tmp_path, loss=np.float32(0.5), count=np.int64(3), dtype=np.dtype("u2"))
    (row,) = rows(tmp_path / "journal.jsonl")
    assert (row["path"], row["loss"], row["count"], row["dtype"]) == (str(tmp_path), 0.5, 3, "uint16")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for make in (lambda: Run(tmp_path / "file"), lambda: new_folder(tmp_path / "file", "r", 1)):
        with pytest.raises(RecipeError, match=r"file.*; name a folder that can be written") as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="no file-size limit there")
def test_a_full_disk_is_one_line_and_the_facts_before_it_stay(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from fairway.base.journal import Run\n"
        "from fairway.base.errors import FairwayError\n"
        "run = Run(Path(sys.argv[1])); run.fact('before', value=1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
        "try: run.fact('after', value='x' * 1000)\n"
        "except FairwayError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'journal.jsonl'}: could not be written: File too large; free some space\n"
    with Run(tmp_path) as run:
        assert run.facts == {"before": {"value": 1}}
        run.fact("then", value=2)
    with Run(tmp_path) as run:
        assert run.facts["then"] == {"value": 2}


def test_a_new_folder_is_never_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    made = [new_folder(tmp_path / "runs", "pocket", 7).name for _ in range(3)]
    assert made == ["pocket-7-20260102-030405", "pocket-7-20260102-030405-2", "pocket-7-20260102-030405-3"]


def test_latest_points_to_the_last_folder_named(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "here").write_text(name)
        (tmp_path / f".latest-{os.getpid()}").symlink_to("left by a killed process of the same number")
        point_latest(tmp_path / name)
        assert (tmp_path / "latest" / "here").read_text() == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one", "two"]


def test_what_is_said_goes_to_standard_error_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    Run(quiet=False).say("hello")
    Run(quiet=True).say("nothing")
    assert capsys.readouterr() == ("", "hello\n")


def test_closing_twice_is_harmless_and_frees_the_folder(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.close()
    run.close()
    with Run(tmp_path) as again:
        assert again.writes


def test_errors_carry_their_exit_codes() -> None:
    assert (RecipeError.exit_code, FairwayError.exit_code) == (2, 1)
