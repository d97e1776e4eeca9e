"""The running frame: a rule that fails costs its own verdict; a submission that breaks its bounds costs itself."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fairway.audit.worker as worker
from fairway.audit import Finding, Place, Report, Step, audit, audit_all, submissions
from fairway.audit.comment import comment
from fairway.audit.examine import rule_modules
from fairway.audit.many import reported
from fairway.audit.page import page
from fairway.audit.second import WHOLE, disagreements, opinions, strangers, verdict_of
from fairway.base.errors import DataError
from fairway.cli import main
from tests.audit.folders import record

IDS = [rule.ID for rule in rule_modules()]


def rule(name: str, check: Any, **more: Any) -> Any:
    return SimpleNamespace(ID=name, CHARGE=f"charge of {name}", CLAUSE="C1", check=check, **more)


def report(*findings: Finding, name: str = "a record") -> Report:
    return Report(name, findings, {"path": "x", "script": "train_gpt.py", "seconds": 0.1})


BROKEN = Finding(
    "min-over-passes",
    "violates",
    "the least of 3 losses is reported",
    "C4",
    Place("train_gpt.py!inner", 40),
    (Step(Place("train_gpt.py!inner", 90), "printed"), Step(Place("train_gpt.py!inner", 40), "torch.minimum")),
)
CLEAN = Finding("slot-on-scored", "clean", "no delta is fitted", "C1")


def test_every_rule_of_the_folder_says_its_id_its_charge_and_its_clause() -> None:
    for module in rule_modules():
        assert module.__name__.rpartition(".")[2].replace("_", "-") == module.ID
        assert module.CHARGE
        assert module.CLAUSE
    assert len(set(IDS)) == len(IDS)


def test_a_rule_that_raises_costs_its_own_verdict_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")

    def fails(case: Any) -> Finding:
        raise KeyError("no such name")

    rules = [rule("bad", fails), rule("good", lambda case: Finding("good", "clean", "fine", "C1"))]
    found = audit(tmp_path / "a.py", rules=rules)
    assert [(f.id, f.verdict) for f in found.rules] == [("bad", "cannot tell"), ("good", "clean")]
    assert "KeyError" in found.rules[0].evidence
    assert "KeyError" in found.facts["failed"]["bad"]


def test_what_cannot_be_read_is_said_under_every_rule_that_asks_for_the_script(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os\nprint 'x'\n")
    found = audit(tmp_path / "a.py")
    asking = [f for f in found.rules if f.evidence.startswith("cannot read a.py:2: Python 2")]
    assert len(asking) >= len(found.rules) - 5
    assert {(f.verdict, str(f.place)) for f in asking} == {("cannot tell", "a.py:2")}


def test_a_line_of_a_notebook_is_the_line_of_its_file(tmp_path: Path) -> None:
    cells = [{"cell_type": "code", "source": ["import os\n", "exec(os.environ['X'])"]}]
    raw = json.dumps({"cells": cells}, indent=1)
    (tmp_path / "a.ipynb").write_text(raw)
    found = next(f for f in audit(tmp_path / "a.ipynb").rules if f.id == "opaque-code")
    assert found.place is not None
    assert "os.environ" in raw.split("\n")[found.place.line - 1]


def test_a_report_survives_its_own_json() -> None:
    whole = report(BROKEN, CLEAN)
    assert reported(json.loads(json.dumps(whole.plain()))) == whole


# Folders of submissions.


def test_a_folder_of_folders_holds_submissions_and_a_record_is_one(tmp_path: Path) -> None:
    one = record(tmp_path / "track" / "one")
    (one / "helper.py").write_text("x = 1\n")
    record(tmp_path / "track" / "two")
    (tmp_path / "lone.py").write_text("x = 1\n")
    (tmp_path / "notes").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in submissions(tmp_path)]
    assert found == ["lone.py", "track/one", "track/two"]
    assert submissions(one) == [one]
    with pytest.raises(DataError, match="no Python script here"):
        submissions(tmp_path / "notes")
    with pytest.raises(DataError, match="no such file"):
        submissions(tmp_path / "nowhere")


def test_reports_come_in_the_order_of_the_paths(tmp_path: Path) -> None:
    for name in "dacb":
        (tmp_path / f"{name}.py").write_text(f"{name} = 1\n")
    counted: list[int] = []
    paths = submissions(tmp_path)
    found = audit_all(paths, workers=2, told=lambda done, newest: counted.append(done))
    assert [each.name for each in found] == ["a", "b", "c", "d"]
    assert counted == [1, 2, 3, 4]


def test_a_submission_that_takes_too_long_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f(n):\n    return f(n - 1) + f(n - 1)\nexec(str(f(40)))\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    started = time.monotonic()
    slow = audit_all([tmp_path / "a.py", tmp_path / "b.py"], workers=1, seconds=0.01)
    assert time.monotonic() - started < 30
    assert slow[0].verdict == "cannot tell"
    assert "takes more than" in slow[0].rules[0].evidence
    quick = audit_all([tmp_path / "b.py"], workers=1)
    assert quick[0].facts["cannot_read"] == {}


def test_what_one_submission_left_in_memory_is_none_of_the_next_one() -> None:
    told = (
        "from fairway.audit.worker import bound\n"
        "bound(64_000_000); first = bytearray(48_000_000)\n"
        "bound(64_000_000); second = bytearray(48_000_000)\n"
        "try:\n    third = bytearray(48_000_000)\nexcept MemoryError:\n    print('bounded')"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "bounded\n", done.stderr


def test_a_worker_answers_in_one_line_and_refuses_in_words(tmp_path: Path) -> None:
    def starved(path: Path, strict: bool, rules: Any, processes: int) -> Report:
        raise MemoryError

    answer = worker._answer(starved, [], {"path": "a.py", "strict": False, "processes": 1})
    assert answer == {"refused": "a.py: takes more than 500 MB to read"}
    answer = worker._answer(audit, [], {"path": str(tmp_path / "none.py"), "strict": False, "processes": 1})
    assert "no such file" in answer["refused"]


# The command line.


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(["audit", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_exit_code_is_1_on_a_violation(tmp_path: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, str(record(tmp_path / "slow", eval_ms=640_000)), "--json")
    found = json.loads(out)
    verdicts = {each["id"]: each for each in found["rules"]}
    assert (code, found["verdict"]) == (1, "violates")
    assert set(verdicts["eval-over-time"]) >= {"id", "verdict", "file", "line", "evidence", "clause"}
    assert (verdicts["eval-over-time"]["verdict"], verdicts["eval-over-time"]["file"]) == (
        "violates",
        "train_seed1337.log",
    )
    code, out, _ = run(capsys, str(record(tmp_path / "good")), "--json")
    assert code == (json.loads(out)["verdict"] == "violates")


def test_people_get_a_table_and_the_way(tmp_path: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, str(record(tmp_path / "slow", eval_ms=640_000)))
    assert code == 1
    assert "eval-over-time" in out
    assert "1. train_seed1337.log:11" in out
    record(tmp_path / "other")
    code, out, _ = run(capsys, str(tmp_path))
    assert code == 1
    assert "2 submissions: 1 violates" in " ".join(out.split())


def test_wrong_usage_is_one_line(tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(capsys, str(tmp_path / "nowhere"))
    assert (code, err.count("\n")) == (1, 1)
    assert "no such file" in err
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    code, _, err = run(capsys, str(tmp_path), "--second-opinion", str(tmp_path / "a.py"))
    assert (code, err.count("\n")) == (2, 1)


# Reviews.


def test_a_review_is_ready_to_paste() -> None:
    said = comment(
        report(
            BROKEN,
            CLEAN,
            Finding("small-tail", "clean", "tails counted twice", "C4", exemption="small-tail"),
            Finding("eval-over-time", "clean", "open: no log was handed in", "R3"),
        ),
        {"min-over-passes": "The least loss over several passes is reported."},
    )
    assert "### Violates the rules: a record" in said
    assert "**min-over-passes** at `train_gpt.py!inner:40`: the least of 3 losses is reported" in said
    assert "2. `train_gpt.py!inner:40` torch.minimum" in said
    assert "*small-tail*" in said
    assert "- eval-over-time: no log was handed in" in said


def test_a_submission_cannot_speak_through_the_review_or_the_page() -> None:
    nasty = Finding("x", "violates", "<script>alert(1)</script> @maintainer\n# head", "C1", Place('"><b>.py', 3))
    said = comment(report(nasty, name="<img src=x> @all"), {})
    assert "<script" not in said
    assert "<img" not in said
    assert "@maintainer" not in said
    assert "\n# head" not in said
    drawn = page([report(nasty, name="<img src=x onerror=alert(1)>")], {}, "<b>")
    assert "<script" not in drawn
    assert "<img" not in drawn
    assert '"><b>' not in drawn


def test_the_page_needs_nothing_from_outside() -> None:
    drawn = page([report(BROKEN, CLEAN), report(CLEAN, name="second")], {"min-over-passes": "the charge"}, "records")
    assert "http" not in drawn.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in drawn
    assert "src=" not in drawn
    assert "prefers-color-scheme: dark" in drawn
    assert drawn.index("a record") < drawn.index(">second<")
    assert "torch.minimum" in drawn
    assert "the charge" in drawn


# The other reviewer.


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("ILLEGAL - trains first", "violates"),
        ("looks legal to me", "clean"),
        ("no violations found", "clean"),
        ("non-compliant", "violates"),
        ("cannot tell, obfuscated", "cannot tell"),
        ("needs human review", "suspect"),
        ("PASS", "clean"),
        ("hm", None),
    ],
)
def test_common_words_for_a_verdict_are_understood(said: str, verdict: str | None) -> None:
    assert verdict_of(said) == verdict


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"rules": [{"id": "min_over_passes", "verdict": "clean", "evidence": "a plain mean"}]}),
        json.dumps([{"rule": "min-over-passes", "status": "pass", "reason": "a plain mean"}]),
        json.dumps({"min-over-passes": {"verdict": "ok", "why": "a plain mean"}}),
        "min over passes: clean, because a plain mean\n",
        "My review\n- `min-over-passes`: legal (a plain mean)\n",
    ],
)
def test_disagreements_are_listed_with_the_evidence_of_both(text: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text(text)
    others = opinions(tmp_path / "other", ["min-over-passes", "slot-on-scored"])
    (found,) = disagreements(report(BROKEN, CLEAN), others)
    assert (found.id, found.ours, found.theirs) == ("min-over-passes", "violates", "clean")
    assert "train_gpt.py!inner:40" in found.our_evidence
    assert "a plain mean" in found.their_evidence


def test_an_agreement_is_none_and_a_verdict_on_the_whole_is_held_against_the_whole(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("min-over-passes: illegal\nVerdict: clean\nbranding: invalid\n")
    others = opinions(tmp_path / "other", ["min-over-passes"])
    (found,) = disagreements(report(BROKEN), others)
    assert (found.id, found.ours, found.theirs) == (WHOLE, "violates", "clean")
    assert [each.id for each in strangers(others, ["min-over-passes"])] == ["branding"]


@pytest.mark.parametrize("text", ["", "nothing here", '{"rules": [', "[" * 100_000])
def test_an_opinion_that_says_nothing_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_text(text)
    with pytest.raises(DataError):
        opinions(tmp_path / "other", IDS)
