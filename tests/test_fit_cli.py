"""`fairway fit`, and `quant.fit` as part of a run: a file just below its budget, the plan that makes it again, and what
is said when that cannot be."""

import json
import shutil
from pathlib import Path

import pytest

from fairway.artifact import open_artifact
from fairway.base.errors import BudgetError
from fairway.quant import Quantized
from tests.tiny.way import run_tiny


@pytest.fixture(scope="module")
def trained(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run that these tests write in."""
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("fits") / "run")


def sized(folder: Path) -> int:
    return (folder / "artifact.fw").stat().st_size


RANS = ("--set", "pack.coder=rans")  # near the entropy of groups of a few hundred bytes, unlike byte coders


@pytest.mark.parametrize("budget", [34_000, 36_000])
def test_the_file_lands_below_its_budget(fairway, trained, tmp_path, budget: int) -> None:
    answer = fairway("fit", trained, "--budget", budget, *RANS, "-o", tmp_path, "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert 0.994 * budget < facts["artifact_bytes"] <= budget == facts["budget"]
    assert facts["artifact_bytes"] == sized(tmp_path)
    assert facts["landed"]
    assert facts["writings"] <= 2
    assert 0 < facts["damage"] < 10
    opened = open_artifact(tmp_path / "artifact.fw")
    bits = {row["tensor"]: row["bits"] for row in facts["choices"]}
    assert bits == {name: value.bits for name, value in opened.tensors.items() if isinstance(value, Quantized)}
    assert {path.name for path in tmp_path.iterdir()} >= {"artifact.fw", "fit.json", "quant.toml"}
    assert not list(tmp_path.glob("*.try*"))
    assert json.loads((tmp_path / "fit.json").read_text()) == facts


def test_more_bytes_do_less_damage_and_the_trade_off_says_so(fairway, trained, tmp_path) -> None:
    damage = []
    for budget in (24_000, 28_000, 34_000):
        answer = fairway("fit", trained, "--budget", budget, *RANS, "-o", tmp_path / str(budget), "--json")
        facts = json.loads(answer.out)
        damage.append(facts["damage"])
        sizes, harms = zip(*((point["bytes"], point["damage"]) for point in facts["tradeoff"]), strict=True)
        assert list(sizes) == sorted(sizes)
        assert list(harms) == sorted(harms, reverse=True)
    assert damage == sorted(damage, reverse=True)


def test_the_plan_makes_the_same_file_again(fairway, trained, tmp_path) -> None:
    """What `quant.toml` says is the whole choice: a run with it needs no fit."""
    answer = fairway("fit", trained, "--budget", "34000", "-o", tmp_path / "fit", "--json")
    assert answer.code == 0, answer.err
    again = shutil.copytree(trained, tmp_path / "again")
    plan = (tmp_path / "fit" / "quant.toml").read_text()
    recipe = (again / "recipe.toml").read_text()
    begin = recipe.index("\n[quant]")
    end = recipe.index("\n[pack]")
    (again / "recipe.toml").write_text(recipe[:begin] + "\n" + plan + recipe[end:])
    for stale in ("integers.safetensors", "artifact.fw", "journal.jsonl", "score.json"):
        (again / stale).unlink()
    for step in ("quantize", "pack"):
        done = fairway(step, again)
        assert done.code == 0, done.err
    assert (again / "artifact.fw").read_bytes() == (tmp_path / "fit" / "artifact.fw").read_bytes()


def test_people_see_the_choices_the_trade_off_and_how_to_go_on(fairway, trained) -> None:
    answer = fairway("fit", trained, "--budget", "30000", "--text", "512", *RANS)
    assert answer.code == 0, answer.err
    assert "30,000" in answer.out
    assert "bits per byte of training text" in answer.out
    assert "█" in answer.out
    assert "quant.fit.budget=30000" in answer.out
    assert (trained / "fit-30000" / "artifact.fw").exists()
    picture = (trained / "fit-30000" / "tradeoff.svg").read_text()
    assert "<svg" in picture
    assert "damage, nats per token" in picture


def test_a_budget_above_the_largest_useful_file_is_reported(fairway, trained, tmp_path) -> None:
    answer = fairway("fit", trained, "--budget", "10000000", "-o", tmp_path, "--json")
    facts = json.loads(answer.out)
    assert facts["artifact_bytes"] == sized(tmp_path) < 100_000
    assert facts["largest_useful_bytes"] == pytest.approx(facts["artifact_bytes"], rel=0.02)
    said = fairway("fit", trained, "--budget", "10000000", "-o", tmp_path)
    assert "the largest useful file" in said.out


def test_a_budget_that_cannot_be_met_names_the_least_size_and_leaves_nothing(fairway, trained, tmp_path) -> None:
    answer = fairway("fit", trained, "--budget", "3000", "-o", tmp_path / "none")
    assert answer.code == 1
    assert answer.err.splitlines()[-1].startswith("BudgetError: fit: 3,000 bytes cannot hold this model")
    assert "least possible file" in answer.err
    assert not (tmp_path / "none").exists()
    least = answer.err.rsplit(" ", 1)[1].replace(",", "").strip()
    done = fairway("fit", trained, "--budget", least, "-o", tmp_path / "least", "--json")
    assert json.loads(done.out)["artifact_bytes"] == int(least), "the size that is named is enough"


def test_what_a_recipe_keeps_in_float16_stays_so_in_a_fit(fairway, trained, tmp_path) -> None:
    kept = ("--set", 'quant.override=[{parts=["v"],bits=16}]')
    answer = fairway("fit", trained, "--budget", "60000", *RANS, *kept, "-o", tmp_path, "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    opened = open_artifact(tmp_path / "artifact.fw").tensors
    values = [value for name, value in opened.items() if ".v." in name]
    assert values
    assert not any(isinstance(value, Quantized) for value in values)
    assert not {row["part"] for row in facts["choices"]} & {"v"}
    assert (0.994 * 60_000 < facts["artifact_bytes"] <= 60_000) or facts["landed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fit", "nowhere", "--budget", "1000"), "RecipeError: nowhere: no run folder"),
        (("fit", "RUN"), "--budget"),
        (("fit", "RUN", "--budget", "0"), "--budget"),
        (("fit", "RUN", "--budget", "30000", "-o", "RUN"), "a run, whose own artifact stays"),
        (("fit", "RUN", "--budget", "30000", "--set", "model.layers=4"), "only quant.* and pack.* may differ"),
        (("fit", "RUN", "--budget", "30000", "--set", "quant.rounding=nearest"), "a fit rounds by gptq"),
        (("fit", "RUN", "--budget", "30000", "--set", "quant.passthrough_elements=100000000"), "no grid to choose"),
        (("fit", "RUN", "--budget", "30000", "--set", "pack.coder=gzip"), "gzip"),
    ],
)
def test_wrong_usage_is_one_line(fairway, trained, arguments: tuple[str, ...], said: str) -> None:
    answer = fairway(*(str(trained) if argument == "RUN" else argument for argument in arguments))
    assert answer.code == 2
    assert said in answer.err
    assert "Traceback" not in answer.err


def test_a_place_that_cannot_be_written_and_code_over_the_budget_are_one_line(fairway, trained, tmp_path) -> None:
    (tmp_path / "file").write_text("a file")
    answer = fairway("fit", trained, "--budget", "34000", "-o", tmp_path / "file")
    assert answer.code == 1
    assert "could not be written" in answer.err.splitlines()[-1]
    answer = fairway("fit", trained, "--budget", "34000", "--code", "-o", tmp_path / "code")
    assert answer.err.splitlines()[-1].startswith("BudgetError: fit: a budget of 34,000 bytes, and the exported script")


def test_a_run_with_a_fit_ends_in_a_file_that_fits_and_is_scored(tmp_path) -> None:
    folder = tmp_path / "run"
    outcome = run_tiny(folder, "quant.fit.budget=34000", "pack.coder=rans", "proof_bytes=0")
    facts = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    fit = next(fact for fact in facts if fact.get("fact") == "fit" or ("artifact_sha256" in fact and "choices" in fact))
    assert 0.994 * 34_000 < outcome.artifact_bytes <= 34_000
    assert fit["artifact_sha256"] == outcome.artifact_sha256
    assert outcome.bits_per_byte < 8
    assert not list(folder.glob("*.try*"))


def test_with_the_code_the_script_fits_in_too(tiny_run, tmp_path) -> None:
    budget = (tiny_run / "train_gpt.py").stat().st_size + 44_000
    outcome = run_tiny(
        tmp_path / "run", f"quant.fit.budget={budget}", "quant.fit.code=true", "pack.coder=rans", "proof_bytes=0"
    )
    script = (tmp_path / "run" / "train_gpt.py").stat().st_size
    assert 0.94 * (budget - script) < outcome.artifact_bytes <= budget - script, "so small a file may miss by 6 %"
    assert outcome.challenge_bytes == outcome.artifact_bytes + script <= budget


def test_a_run_whose_fit_is_impossible_stops_there(tmp_path) -> None:
    with pytest.raises(BudgetError, match="least possible file"):
        run_tiny(tmp_path / "run", "quant.fit.budget=2000")
    assert not (tmp_path / "run" / "artifact.fw").exists()
    assert not (tmp_path / "run" / "score.json").exists()
