"""The command line as a person and a program meet it: help at once, tables, JSON, exit codes, one-line mistakes."""

import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest

from fairway.base import slots
from tests.score import nearby
from tests.tiny.way import SAMPLE, TINY

VERBS = ["run", "train", "quantize", "pack", "score", "probe", "sample", "doctor", "list", "list recipes"]
VERBS += ["list techniques"]


@pytest.fixture(autouse=True)
def _decoded_here(monkeypatch):
    """Proofs of these runs are decoded in this process; tests/test_prove_cli.py has those of another."""
    nearby.watch(monkeypatch)


def one_line(answer, code, *says):
    """The promise of every error: its exit code, one line on standard error, nothing on standard output."""
    assert answer.code == code, answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err
    for words in says:
        assert words in answer.err
    return True


def test_help_answers_at_once_since_nothing_heavy_is_imported():
    """Under 1.5 s of processor time for a fresh Python; torch alone takes about as long."""
    program = (
        "import sys, time, fairway.cli as cli\n"
        "try:\n    cli.main(['run', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'sentencepiece'} & set(sys.modules), 'a heavy import'\n"
        "assert time.process_time() < 1.5, time.process_time()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(fairway, verb):
    answer = fairway(*verb.split(), "--help")
    assert answer.code == 0
    assert "Usage:" in answer.out
    assert answer.err == ""


def test_list_recipes_names_parameters_budget_and_summary_of_each(fairway):
    listed = json.loads(fairway("list", "recipes", "--json").out)
    assert all(set(row) >= {"name", "params", "budget_bytes", "summary"} for row in listed)
    by_name = {row["name"]: row for row in listed}
    counts = {"b": 33_580_124, "b6": 33_317_980, "baseline": 17_059_912}  # of the challenge's own scripts
    assert {name: by_name[name]["params"] for name in counts} == counts
    assert {by_name[name]["budget_bytes"] for name in counts} == {16_000_000}
    assert by_name["pocket"]["budget_bytes"] == 1_000_000
    assert all(row["summary"] for row in listed)
    table = fairway("list", "recipes").out
    assert all(name in table for name in by_name)
    assert "33,580,124" in table


def test_list_techniques_shows_every_file_of_every_slot(fairway):
    listed = json.loads(fairway("list", "techniques", "--json").out)
    assert listed == {slot: slots.kinds(f"fairway.{slot}") for slot in listed}
    assert listed["model.attention"] == ["exclusive", "plain"]
    assert len(listed) == 13
    assert "exclusive, plain" in fairway("list", "techniques").out


def test_doctor_answers_in_a_table_and_in_json(fairway):
    checks = json.loads(fairway("doctor", "--json").out)
    assert {"name", "state", "found", "remedy"} <= set(checks[0])
    assert "python" in {check["name"] for check in checks}
    assert "python" in fairway("doctor").out


def test_a_run_ends_in_a_table_a_folder_and_a_link_to_the_latest(fairway, tmp_path):
    """Short: two seeds of two steps, and 240 bytes held out, all of them proven."""
    short = ["--set", f"data.path={SAMPLE}", "--set", "train.schedule.steps=2", "--runs", tmp_path]
    few = ["--set", "data.source.valid_fraction=0.02"]
    answer = fairway("run", TINY, *short, *few, "--device", "cpu", "--seeds", "1,2")
    assert answer.code == 0, answer.err
    for words in (
        "float",
        "quantised",
        "sliding",
        "adapted",
        "xz -9e",
        "the score, proven",
        " of code, of 120,000, weighed",
        "2 seeds:",
    ):
        assert words in answer.out
    folders = sorted(path for path in tmp_path.iterdir() if path.name != "latest")
    assert [path.name.split("-")[:2] for path in folders] == [["tiny", "1"], ["tiny", "2"]]
    assert (tmp_path / "latest").resolve() == folders[-1].resolve()
    bare = ["--set", "baselines=false", "--set", "proof_bytes=0"]
    whole = fairway("run", TINY, *short, "--device", "cpu", "--json", *bare)
    assert json.loads(whole.out)["seed"] == 1337
    assert whole.err == ""
    newest = (tmp_path / "latest").resolve()
    assert newest not in folders
    failed = fairway("run", TINY, *short, "--json", "--set", "budget.artifact_bytes=9")
    assert one_line(failed, 1, "BudgetError: artifact + code: ")
    assert (tmp_path / "latest").resolve() == newest, "a run that did not end is never the latest"


def test_the_steps_one_by_one_end_in_the_same_score_as_the_whole_way(fairway, tmp_path, tiny_run):
    answer = fairway("train", TINY, "--set", f"data.path={SAMPLE}", "--runs", tmp_path, "--device", "cpu")
    assert answer.code == 0, answer.err
    (folder,) = tmp_path.iterdir()
    assert one_line(fairway("pack", folder), 2, f"{folder}/integers.safetensors: not there yet")
    assert "next: fairway pack" in fairway("quantize", folder).out
    assert "weighed" in fairway("pack", folder).out
    scored = json.loads(fairway("score", folder, "--json").out)
    assert scored["bits_per_byte"] == json.loads((tiny_run / "score.json").read_text())["bits_per_byte"]
    assert json.loads((folder / "score.json").read_text()) == scored


def test_a_run_is_resumed_by_its_folder(fairway, tmp_path, tiny_run):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "score.json").unlink()
    answer = fairway("run", "--resume", folder, "--json")
    assert (
        json.loads(answer.out)["artifact_sha256"]
        == json.loads((tiny_run / "score.json").read_text())["artifact_sha256"]
    )
    assert one_line(fairway("run", "--resume", folder, "--set", "train.clip=0.5"), 2, "holds another recipe")


def test_any_text_is_scored_with_an_artifact(fairway, tmp_path, tiny_run):
    text = SAMPLE.read_bytes()[3000:5000]
    (tmp_path / "text").write_bytes(text)
    found = json.loads(fairway("score", "-a", tiny_run / "artifact.fw", tmp_path / "text", "--json").out)
    assert found["bits_per_byte"] == found["code_length_bits"] / len(text)
    assert 1 < found["bits_per_byte"] < 4, "training text"
    words = fairway("score", "-a", tiny_run / "artifact.fw", tmp_path / "text").out
    assert f"{found['bits_per_byte']:.4f} bits per byte" in words
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 4)
    noise = json.loads(fairway("score", "-a", tiny_run / "artifact.fw", tmp_path / "noise", "--json").out)
    assert noise["text_bytes"] == 1024, "any bytes at all"
    assert math.isfinite(noise["bits_per_byte"])


def test_an_artifact_writes_what_its_seed_says(fairway, tiny_run):
    call = ["sample", "-a", tiny_run / "artifact.fw", "--prompt", "The harbour", "--tokens", 12, "--seed", 5]
    first, again = fairway(*call), fairway(*call)
    assert first.code == 0
    assert first.out.startswith("The harbour")
    assert len(first.out) > len("The harbour\n")
    assert first.out == again.out


def test_a_run_is_probed_and_found_honest(fairway, tmp_path, tiny_run):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    answer = fairway("probe", folder, "--flips", 2, "--tokens", 300, "--json")
    assert answer.code == 0, answer.err
    reports = json.loads(answer.out)
    assert [report["stage"] for report in reports] == ["sliding", "adapted"]
    assert all(finding["worst"] <= finding["allowed"] for report in reports for finding in report["findings"])
    assert "adapted: flip" in fairway("probe", folder, "--flips", 2, "--tokens", 300).out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nosuch"], "recipe 'nosuch': no such file and no such name; `fairway list recipes`"),
        (["run", "nosuch.toml"], "no such file"),
        (["run"], "name a recipe, or a run folder with --resume"),
        (["run", "pocket", "--resume", "x"], "name a recipe, or a run folder with --resume"),
        (["run", "--resume", "nosuch"], "nosuch: no run folder (recipe.toml is missing)"),
        (["train", "nosuch"], "no such file"),
        (["quantize", "nosuch"], "no run folder"),
        (["pack", "nosuch"], "no run folder"),
        (["score", "nosuch"], "no run folder"),
        (["probe", "nosuch"], "no run folder"),
        (["run", TINY, "--seeds", "1,two"], "--seeds 1,two: whole numbers"),
        (["run", TINY, "--device", "tpu"], "--device tpu: choices: auto, cpu, cuda"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_one_line_and_exit_code_2(fairway, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert one_line(fairway(*arguments), 2, "RecipeError: ", says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["bogus"], ["run", "--bogus"], ["score"], ["probe", "x", "--flips", "none"]])
def test_an_unknown_verb_or_option_is_exit_code_2(fairway, arguments):
    answer = fairway(*arguments)
    assert answer.code == 2
    assert "Traceback" not in answer.err


def test_a_terminated_run_writes_a_checkpoint_and_goes_on(fairway, tmp_path, tiny_run):
    """SIGTERM, as schedulers send it, to a real process in the middle of training."""
    if os.name == "nt":
        pytest.skip("no SIGTERM to catch on Windows")
    command = [sys.executable, "-m", "fairway", "run", str(TINY), "--set", f"data.path={SAMPLE}", "--runs"]
    steps = ["--set", "train.schedule.steps=4000", "--device", "cpu"]
    process = subprocess.Popen([*command, str(tmp_path), *steps], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/curves.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    _, err = process.communicate(timeout=60)
    (folder,) = tmp_path.iterdir()
    assert (folder / "checkpoint.pt").exists(), err
    assert f"go on with: fairway run --resume {folder}" in err
    assert process.returncode == 130
    assert not (folder / "weights.safetensors").exists()
