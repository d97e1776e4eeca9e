"""The record folder: what it holds, what it refuses, how it is brought up to date, and its check."""

import hashlib
import json
import shutil
import statistics

import pytest

from fairway.base import tables
from fairway.base.specs import to_plain
from fairway.lab.submit import submit, train_script
from fairway.lab.submit.readme import standing
from fairway.recipe import load
from tests.lab.conftest import SHORT
from tests.tiny.way import SAMPLE, TINY, run_tiny

FILES = {
    "README.md",
    "requirements.txt",
    "score.py",
    "submission.json",
    "train_gpt.py",
    "train_seed1.log",
    "train_seed2.log",
}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def record(two_runs):
    folder = two_runs.parent / "record"
    submit([two_runs / "tiny-1", two_runs / "tiny-2"], folder, bar=4.0, author="A Person", github="person")
    return folder


def rebook(run, key, old, new):
    journal = (run / "journal.jsonl").read_text()
    assert f'"{key}": "{old}"' in journal
    (run / "journal.jsonl").write_text(journal.replace(f'"{key}": "{old}"', f'"{key}": "{new}"'))


def told(record):
    return json.loads((record / "submission.json").read_text())


def test_a_record_holds_what_the_challenge_asks_for(record, two_runs):
    assert {path.name for path in record.iterdir()} == FILES
    said = told(record)
    scores = [json.loads((two_runs / f"tiny-{seed}" / "score.json").read_text()) for seed in (1, 2)]
    assert {"author", "github_id", "name", "blurb", "date", "val_loss", "val_bpb", "bytes_total", "bytes_code"} <= set(
        said
    )
    assert (said["author"], said["github_id"], said["seeds"]) == ("A Person", "person", [1, 2])
    assert said["val_bpb"] == statistics.mean(score["bits_per_byte"] for score in scores)
    assert said["bytes_total"] == max(score["challenge_bytes"] for score in scores)
    assert said["bytes_code"] == (record / "train_gpt.py").stat().st_size
    nats = [score["code_length_bits"] * 0.6931471805599453 / score["tokens"] for score in scores]
    assert said["val_loss"] == pytest.approx(statistics.mean(nats), rel=1e-12)
    for name in ("train_gpt.py", "score.py"):
        assert (record / name).read_bytes() == (two_runs / "tiny-1" / name).read_bytes()
    assert any(line.startswith("torch==") for line in (record / "requirements.txt").read_text().splitlines())


def test_each_log_begins_with_the_hashes_and_ends_with_the_score(record, two_runs):
    for seed in (1, 2):
        log = (record / f"train_seed{seed}.log").read_text()
        for name in ("train_gpt.py", "score.py", "artifact.fw"):
            assert digest(two_runs / f"tiny-{seed}" / name) in log.split("step:")[0]
        score = json.loads((two_runs / f"tiny-{seed}" / "score.json").read_text())
        assert score["text_sha256"] in log.split("step:")[0]
        assert f"val_bpb:{score['bits_per_byte']:.8f} (adapted)" in log.splitlines()[-1]
        assert log.count("\nstep:") == 25


def test_the_readme_tells_each_seed_and_links_each_rule_to_a_fact(record, two_runs):
    text = (record / "README.md").read_text()
    for seed in (1, 2):
        score = json.loads((two_runs / f"tiny-{seed}" / "score.json").read_text())
        row = next(line for line in text.splitlines() if line.startswith(f"| {seed} |"))
        stages = score["stages"]
        for value in (f"{stages['sliding']:.4f}", f"{stages['adapted']:.4f}", f"{score['headroom_bytes']:,}"):
            assert value in row
    assert "| **mean** |" in text
    for line in ("**size**", "**training time**", "**causal**", "**one pass**"):
        assert line in text
    assert "`artifact.bytes` = " in text
    assert "`calibration.seconds` = " in text
    assert "broken: `device.ranks` = 1" in text, "a CPU is not eight H100s, and the record says so"
    assert "another text than the challenge's" in text
    assert "Bar: 4.0000" in text


def test_a_record_is_written_whole_or_not_at_all(record, two_runs, tmp_path, fairway, monkeypatch):
    again = fairway("submit", two_runs / "tiny-1", "-o", record)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "exists already; use --update" in again.err
    assert "no record there" in fairway("submit", two_runs / "tiny-1", "--update", tmp_path / "none").err

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fairway.lab.submit.record._log", fails)
    failed = fairway("submit", two_runs / "tiny-1", "-o", tmp_path / "new")
    assert (failed.code, failed.err.count("\n")) == (2, 1)
    assert "free some space" in failed.err
    assert list(tmp_path.iterdir()) == [], "nothing is left, not even what was begun"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("recipe", "train.clip = 0.5, but 1.0 in"),
        ("seed", "seed 1 as"),
        ("script", "not the script that the run booked"),
        ("unfinished", "score.json is missing; name a finished run"),
        ("text", "held_out_text"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(two_runs, tmp_path, fairway, change, says):
    other = shutil.copytree(two_runs / ("tiny-1" if change == "seed" else "tiny-2"), tmp_path / "other")
    if change == "recipe":
        made = load(str(TINY), (f"data.path={SAMPLE}", *SHORT, "seed=2", "train.clip=0.5"))
        (other / "recipe.toml").write_text(tables.dump(to_plain(made)))
        (other / "train_gpt.py").write_bytes(train_script(made))
        rebook(other, "train_sha256", digest(two_runs / "tiny-2" / "train_gpt.py"), digest(other / "train_gpt.py"))
    elif change == "script":
        (other / "train_gpt.py").write_text("print(1)")
    elif change == "unfinished":
        (other / "score.json").unlink()
    elif change == "text":
        text = json.loads((other / "score.json").read_text())["text_sha256"]
        rebook(other, "text_sha256", text, "0" * 64)
        (other / "score.json").write_text((other / "score.json").read_text().replace(text, "0" * 64))
    answer = fairway("submit", two_runs / "tiny-1", other, "-o", tmp_path / "record")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert says in answer.err
    assert not (tmp_path / "record").exists()


def test_a_run_named_twice_is_one_row(record, two_runs, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(record, folder)
    submit([two_runs / "tiny-2"], folder, update=True)
    assert [(row["seed"], row["superseded"]) for row in told(folder)["runs"]] == [(1, False), (2, False)]
    assert {path.name for path in folder.iterdir()} == FILES


def test_an_update_writes_the_tables_again_and_keeps_the_superseded_row(record, two_runs, tmp_path, fairway):
    """A new run for seed 2, and another seed: seed 1 stands, the old seed 2 is marked, a person's words stay."""
    folder = shutil.copytree(record, tmp_path / "record")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("## Architecture", "## Thanks\n\nTo all.\n\n## Architecture"))
    for name, seed in (("tiny-2-again", 2), ("tiny-3", 3)):
        copy = shutil.copytree(two_runs / "tiny-2", tmp_path / name)
        recipe = copy / "recipe.toml"
        recipe.write_text(recipe.read_text().replace("seed = 2", f"seed = {seed}"))
    answer = fairway("submit", tmp_path / "tiny-2-again", tmp_path / "tiny-3", "--update", folder, "--json")
    assert answer.code == 0, answer.err
    rows = json.loads(answer.out)["runs"]
    assert [(row["seed"], row["superseded"]) for row in rows] == [(1, False), (2, True), (2, False), (3, False)]
    assert told(folder)["seeds"] == [1, 2, 3]
    assert told(folder)["author"] == "A Person"
    text = readme.read_text()
    assert "To all." in text
    assert "| 2 (superseded, " in text
    assert "| 3 |" in text
    assert {path.name for path in folder.iterdir()} == {*FILES, "train_seed3.log", "superseded"}
    assert [path.name for path in (folder / "superseded").iterdir()] == ["train_seed2-tiny-2.log"]
    readme.write_text(text.replace("<!-- /results -->", ""))
    broken = fairway("submit", tmp_path / "tiny-3", "--update", folder)
    assert (broken.code, broken.err.count("\n")) == (2, 1)
    assert "<!-- /results --> are gone" in broken.err
    assert told(folder)["seeds"] == [1, 2, 3]


def test_what_changed_is_told_against_another_run(two_runs, tmp_path, fairway):
    other = run_tiny(
        tmp_path / "before", "train.schedule.steps=5", "baselines=false", "proof_bytes=0", "quant.matrix.bits=4"
    )
    answer = fairway("submit", two_runs / "tiny-1", "-o", tmp_path / "record", "--replaces", tmp_path / "before")
    assert answer.code == 0, answer.err
    text = (tmp_path / "record" / "README.md").read_text()
    assert "| `quant.matrix.bits` | 4 | 5 |" in text
    assert "| `train.schedule.steps` | 5 | 25 |" in text
    assert f"| bits per byte | {other.bits_per_byte:.4f} |" in text
    assert "`model.width`" not in text


def test_a_check_makes_the_scripts_again_and_runs_them_alone(record, two_runs, fairway, monkeypatch):
    """Same bytes, same bits, the same first losses; this package is hidden from them, as all that is not required."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    answer = fairway("submit", "--check", record, "--runs", two_runs, "--device", "cpu", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["rebuilt"] == {"train_gpt.py": True, "score.py": True}
    assert found["made_by"] == "checkout"
    assert found["same_score"]
    assert found["exact"]
    assert found["losses"]["script"] == found["losses"]["run"]
    assert len(found["losses"]["run"]) == 20
    assert "torch" in found["importable"]
    assert {"fairway", "typer", "pydantic", "pytest", "scipy"}.isdisjoint(found["importable"])


def test_a_check_names_what_differs(record, two_runs, tmp_path, fairway):
    folder = shutil.copytree(record, tmp_path / "record")
    (folder / "requirements.txt").write_text("numpy\n")
    answer = fairway("submit", "--check", folder, "--runs", two_runs)
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert "No module named 'torch'" in answer.err
    assert "none of the runs of this record" in fairway("submit", "--check", folder, "--runs", tmp_path).err
    for words in (("--check", folder, "--update", folder), (), ("-o", tmp_path / "x", "--check", folder)):
        refused = fairway("submit", *words)
        assert (refused.code, refused.err.count("\n")) == (2, 1)


def row(loss, verdict="held"):
    return {"val_loss": loss, "val_bpb": 0.5 * loss, "rules": [{"rule": "size", "verdict": verdict}]}


def test_a_record_is_one_by_the_margin_and_by_the_chance():
    """0.5 bits per byte for a nat here: a bar of 1.0 is 2 nats, and 1.995 must be beaten at p < 0.01."""
    assert "**Record** by the score." in standing([row(1.98), row(1.981), row(1.979)], 1.0)
    assert "but not by the rules" in standing([row(1.98), row(1.981), row(1.979, "broken")], 1.0)
    assert "about 2 more seeds" in standing([row(1.9)], 1.0)
    assert "however many" in standing([row(1.996), row(1.997), row(1.998)], 1.0)
    assert "no bar was named" in standing([row(1.9)], None)
