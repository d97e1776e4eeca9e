"""Text to score on a CPU, in seconds: what the whole way promises, on 12 KB of prose written for these tests."""

import bz2
import hashlib
import json
import lzma
import shutil
import subprocess
import sys

import pytest

from fairway.artifact import open_artifact
from fairway.base.errors import BudgetError, RecipeError
from fairway.base.journal import Run
from tests.score import nearby
from tests.tiny.way import SAMPLE, interrupt_tiny, run_tiny

SCORE_KEYS = {
    *("bits_per_byte", "text_bytes", "code_length_bits", "tokens", "stages", "seed", "params", "proof"),
    *("artifact_bytes", "challenge_bytes", "closed_bytes", "headroom_bytes", "baselines", "baselines_with_train"),
    *("train_seconds", "calibration_seconds", "eval_seconds", "recipe_sha256", "text_sha256", "artifact_sha256"),
}
PRODUCTS = ["weights.safetensors", "hessians.safetensors", "integers.safetensors", "artifact.fw", "score.json"]


@pytest.fixture(autouse=True)
def _decoded_here(monkeypatch):
    """Proofs of these runs are decoded in this process; tests/test_prove_cli.py has those of another."""
    nearby.watch(monkeypatch)


def score_of(folder):
    return json.loads((folder / "score.json").read_text())


def journal_of(folder):
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_whole_way_ends_in_a_score_and_again_in_the_same_bits(tiny_run, tmp_path):
    outcome = run_tiny(tmp_path / "run")
    assert 0 < outcome.bits_per_byte < 8
    assert outcome.bits_per_byte == score_of(tiny_run)["bits_per_byte"]
    for product in PRODUCTS[:-1]:
        assert digest(tmp_path / "run" / product) == digest(tiny_run / product), product
    beside = [
        "recipe.toml",
        "journal.jsonl",
        "curves.jsonl",
        ".lock",
        "prices.npy",
        "profile.npz",
        "proof.fwc",
        "train_gpt.py",
        "score.py",
    ]
    assert sorted([*PRODUCTS, *beside]) == sorted(path.name for path in (tmp_path / "run").iterdir()), (
        "the checkpoint is gone, and nothing half-written is left"
    )


def test_the_score_file_says_what_it_promises(tiny_run):
    score = score_of(tiny_run)
    assert set(score) >= SCORE_KEYS
    assert list(score["stages"]) == ["float", "quantized", "sliding", "adapted"]
    assert score["bits_per_byte"] == score["code_length_bits"] / score["text_bytes"]
    assert score["bits_per_byte"] == score["stages"]["adapted"]
    sizes = {name: (tiny_run / name).stat().st_size for name in ("artifact.fw", "train_gpt.py", "score.py")}
    assert (
        score["challenge_bytes"]
        == sizes["artifact.fw"] + sizes["train_gpt.py"]
        == score["artifact_bytes"] + score["code_bytes"]
    )
    assert score["closed_bytes"] == sizes["artifact.fw"] + sizes["score.py"]
    assert score["headroom_bytes"] == 120_000 - score["challenge_bytes"]
    assert score["train_seconds"] > 0 < score["eval_seconds"]
    assert score["seed"] == 1337
    assert abs(score["stages"]["float"] - score["stages"]["quantized"]) < 0.05


def test_the_scored_bytes_are_those_of_the_text_held_out(tiny_run):
    """The sample's last fifth, by the recipe; counted here without fairway."""
    score, text = score_of(tiny_run), SAMPLE.read_bytes()
    held_out = text[-score["text_bytes"] :]
    assert len(held_out) == pytest.approx(0.2 * len(text), abs=1)
    assert score["text_sha256"] == hashlib.sha256(held_out).hexdigest()
    baselines = score["baselines"]
    assert baselines["bzip2"] == 8 * len(bz2.compress(held_out, 9)) / len(held_out)
    assert baselines["xz"] == 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)
    assert set(baselines) == {"xz", "zstd", "brotli", "bzip2"}


def test_the_artifact_is_weighed_and_hashed_on_disk(tiny_run):
    score, path = score_of(tiny_run), tiny_run / "artifact.fw"
    assert score["artifact_bytes"] == path.stat().st_size <= 40_000
    assert score["artifact_sha256"] == digest(path)
    opened = open_artifact(path)
    assert sum(opened.sections.values()) == path.stat().st_size
    assert score["params"] == sum(parameter.numel() for parameter in opened.model().parameters())


def test_the_journal_holds_every_fact_of_the_way(tiny_run):
    facts = {row["fact"]: row for row in journal_of(tiny_run)}
    wanted = "run versions code device train_text held_out_text tokenizer model train calibration quant artifact"
    assert {*wanted.split(), "score_float", "score_quantized", "score_sliding", "score_adapted", "done"} <= set(facts)
    times = [row["time"] for row in journal_of(tiny_run)]
    assert times == sorted(times)
    assert facts["artifact"]["bytes"] == (tiny_run / "artifact.fw").stat().st_size
    assert facts["train"]["steps"] == 60
    assert facts["train"]["tokens"] == 60 * 512
    assert facts["train_text"]["sha256"] != facts["held_out_text"]["sha256"]
    assert facts["device"]["device"] == "cpu"
    assert facts["score_float"]["artifact_sha256"] == digest(tiny_run / "weights.safetensors")
    losses = [json.loads(line)["loss"] for line in (tiny_run / "curves.jsonl").read_text().splitlines()]
    assert len(losses) == 60
    assert losses[-1] < 0.7 * losses[0]


def test_gptq_left_a_smaller_error_than_nearest_on_every_matrix(tiny_run):
    rows = [row for row in journal_of(tiny_run) if row.get("rounding") == "gptq"]
    assert len(rows) >= 18
    assert all(row["objective"] < row["objective_nearest"] for row in rows)


def test_another_seed_gives_another_model(tiny_run, tmp_path):
    outcome = run_tiny(tmp_path / "other", "seed=42", "train.schedule.steps=5", "proof_bytes=0", "baselines=false")
    assert outcome.artifact_sha256 != score_of(tiny_run)["artifact_sha256"]
    assert outcome.seed == 42


@pytest.mark.parametrize("first", range(1, len(PRODUCTS)), ids=lambda i: f"from_{PRODUCTS[i].split('.')[0]}")
def test_a_run_goes_on_from_any_product(tiny_run, tmp_path, first):
    """Later products lost: they are made again, the same to the bit, and what is there is not."""
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    for product in PRODUCTS[first:]:
        (folder / product).unlink()
    before = len(journal_of(folder))
    outcome = run_tiny(folder)
    assert digest(folder / "artifact.fw") == digest(tiny_run / "artifact.fw")
    assert outcome.bits_per_byte == score_of(tiny_run)["bits_per_byte"]
    again = [row["fact"] for row in journal_of(folder)[before:]]
    made = {"hessians": "calibration", "integers": "quant", "artifact": "artifact"}
    for product, fact in zip(PRODUCTS[1:4], made.values(), strict=True):
        assert (fact in again) == (PRODUCTS.index(product) >= first), fact
    assert "train" not in again


def test_a_run_interrupted_in_training_ends_with_the_same_bits(tiny_run, tmp_path):
    interrupt_tiny(tmp_path / "run", 23)
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    run_tiny(tmp_path / "run")
    assert {"fact": "resumed", "step": 23}.items() <= next(
        row.items() for row in journal_of(tmp_path / "run") if row["fact"] == "resumed"
    )
    assert digest(tmp_path / "run" / "artifact.fw") == digest(tiny_run / "artifact.fw")


def test_a_run_does_not_go_on_with_another_recipe(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    with pytest.raises(RecipeError, match="holds another recipe"):
        run_tiny(folder, "train.clip=0.5")
    assert digest(folder / "recipe.toml") == digest(tiny_run / "recipe.toml")


def test_an_artifact_over_budget_leaves_no_file_and_no_score(tmp_path):
    """26,000 bytes and the script's 60,000 into 40,000, which would hold the artifact alone."""
    says = r"artifact \+ code: \d\d,\d{3} bytes is over the limit of 40,000; 2\d,\d{3} of them are the artifact"
    with pytest.raises(BudgetError, match=says) as caught:
        run_tiny(tmp_path / "run", "budget.artifact_bytes=40000")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "run" / "artifact.fw").exists()
    assert not (tmp_path / "run" / "score.json").exists()
    with pytest.raises(BudgetError, match="over the limit"):
        run_tiny(tmp_path / "run", "budget.artifact_bytes=40000")


@pytest.mark.parametrize(("budget", "says"), [("train_seconds", "training"), ("eval_seconds", "adapted score")])
def test_a_clock_over_budget_stops_the_run(tmp_path, budget, says):
    with pytest.raises(BudgetError, match=f"{says}.* s is over the limit of 0.001; "):
        run_tiny(tmp_path / "run", f"budget.{budget}=0.001", "train.schedule.steps=3")
    assert not (tmp_path / "run" / "score.json").exists()


def test_two_processes_never_share_a_run_folder(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "integers.safetensors").unlink()
    with Run(folder):
        command = [sys.executable, "-m", "fairway", "quantize", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"run folder {folder}: in use by another process; wait for it" in done.stderr
    assert not (folder / "integers.safetensors").exists()
