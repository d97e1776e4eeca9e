"""Hessians from every source, the whole way; what it books, what a kill leaves, what travels in a script."""

import hashlib
import json

import pytest

from fairway.artifact.bundle import unpacked
from fairway.base.errors import RecipeError
from fairway.lab.submit import score_script, train_script
from fairway.recipe import load
from fairway.steps import making
from tests.lab.test_scripts import alone
from tests.tiny.way import SAMPLE, TINY, interrupt_tiny, run_tiny

SHORT = ("baselines=false", "proof_bytes=0", "score.result=quantized", "score.adapt=none")
ONLINE = 'quant.calibration={kind="online", every=4, start_scale=0.9}'
GENERATED = 'quant.calibration={kind="generated", sequences=4, tokens=64}'


def facts_of(folder):
    rows = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return {row["fact"]: row for row in rows}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_text_of_its_own_is_written_outside_the_training_clock(tmp_path, monkeypatch):
    """No training text is read for it, and it is booked apart; the rest of the way is as ever."""

    def never(*_):
        raise AssertionError("training text was read after training")
        yield

    monkeypatch.setattr(making, "_calibration", never)
    outcome = run_tiny(tmp_path / "run", *SHORT, GENERATED, "train.schedule.steps=20")
    facts = facts_of(tmp_path / "run")
    assert {"seconds": 0.0, "sequences": 0}.items() <= facts["calibration"].items()
    assert facts["calibration"]["matrices"] > 15
    assert outcome.calibration_seconds == 0
    assert {"sequences": 4, "tokens": 256}.items() <= facts["generated"].items()
    assert facts["generated"]["seconds"] > 0
    assert outcome.bits_per_byte == pytest.approx(outcome.stages["float"], abs=0.1)


def test_hessians_gathered_while_training_outlive_a_kill_to_the_last_bit(tmp_path):
    """Killed after step 23 of 32, two gatherings behind it and three to come; what it left is needed as long as there
    are no Hessians."""
    chosen = (*SHORT, ONLINE, "train.schedule.steps=32")
    run_tiny(tmp_path / "whole", *chosen)
    facts = facts_of(tmp_path / "whole")
    assert facts["online"]["gatherings"] == 4
    assert 0 < facts["online"]["seconds"] < facts["train"]["seconds"]
    assert facts["calibration"]["seconds"] == 0
    interrupt_tiny(tmp_path / "run", 23, *chosen)
    run_tiny(tmp_path / "run", *chosen)
    for product in ("weights.safetensors", "observed.safetensors", "hessians.safetensors", "artifact.fw"):
        assert digest(tmp_path / "run" / product) == digest(tmp_path / "whole" / product), product
    (tmp_path / "run" / "hessians.safetensors").unlink()
    (tmp_path / "run" / "observed.safetensors").unlink()
    with pytest.raises(RecipeError, match="gathered while training, and gone; start a new run"):
        run_tiny(tmp_path / "run", *chosen)


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        ('{kind="generated", tokens=65}', r"quant\.calibration\.tokens = 65: .* model\.context = 64"),
        ('{kind="online", every=9}', r"quant\.calibration: no Hessian in 3 steps: every = 9"),
    ],
)
def test_a_source_that_cannot_be_is_refused_and_leaves_no_weights(tmp_path, calibration, says):
    overrides = (*SHORT, f"quant.calibration={calibration}", "train.schedule.steps=3")
    for _ in range(2):
        with pytest.raises(RecipeError, match=says):
            run_tiny(tmp_path / "run", *overrides)
        assert "train" not in facts_of(tmp_path / "run")
        assert not (tmp_path / "run" / "hessians.safetensors").exists()


@pytest.mark.parametrize("kind", ["text", "generated", "online"])
def test_a_script_holds_the_source_that_its_recipe_names_and_no_other(kind):
    recipe = load("b6", (f"quant.calibration={kind}",))
    held = {name for name in unpacked(train_script(recipe).decode())[1] if "quant.calibration." in name}
    assert held == {f"fairway.quant.calibration.{kind}"}
    assert not any("fairway.quant.calibration" in name for name in unpacked(score_script(recipe).decode())[1])


@pytest.mark.parametrize("calibration", [GENERATED, 'quant.calibration={kind="online", every=1, start_scale=1.0}'])
def test_a_script_gathers_as_the_package_does(tmp_path, calibration):
    chosen = (f"data.path={SAMPLE}", *SHORT, "train.schedule.steps=3", calibration)
    run_tiny(tmp_path / "run", *chosen[1:])
    done = alone(train_script(load(str(TINY), chosen)), tmp_path / "empty", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "empty" / "runs").iterdir()
    assert digest(made / "hessians.safetensors") == digest(tmp_path / "run" / "hessians.safetensors")
    assert digest(made / "artifact.fw") == digest(tmp_path / "run" / "artifact.fw")
