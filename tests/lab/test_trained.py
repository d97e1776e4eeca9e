"""Runs of a sweep that train the very same model do so once."""

import json
import shutil

import pytest

from fairway import steps
from fairway.artifact import open_artifact
from fairway.base.devices import choose
from fairway.base.journal import Run
from fairway.lab.submit import checkout
from fairway.lab.sweep.trained import equals, order, share, take_weights
from tests.tiny.way import run_tiny, tiny_recipe

BITS = "quant.matrix.bits=4"


def prepared(recipe, run):
    """A run as it is before its training."""
    steps.begin(recipe, run, choose("cpu"), checkout())
    steps.prepare(recipe, run)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A sweep's folder with one finished run in it."""
    folder = tmp_path_factory.mktemp("sweep")
    run_tiny(folder / "one", "proof_bytes=0", "baselines=false")
    return folder


@pytest.mark.parametrize(
    "change", [BITS, "pack.coder=lzma", "score.adapt=none", "quant.prune={when='after', fraction=0.1}"]
)
def test_what_comes_after_training_decides_no_weights(change):
    more = ("score.result=sliding",) if "adapt=none" in change else ()
    assert share(tiny_recipe(change, *more)) == share(tiny_recipe())


@pytest.mark.parametrize(
    "change",
    [
        "seed=7",
        "train.clip=0.5",
        "model.hidden=32",
        "data.loader=sequential",
        "qat.kind=straight_through",
        "quant.calibration={kind='online', every=5}",
    ],
)
def test_what_training_reads_does(change):
    assert share(tiny_recipe(change)) != share(tiny_recipe())


def test_with_fake_grids_the_grids_decide_too():
    qat = "qat.kind=straight_through"
    assert share(tiny_recipe(qat, BITS)) != share(tiny_recipe(qat))


def test_each_training_begins_before_those_that_take_its_weights_seed_by_seed():
    recipes = [tiny_recipe(*more, f"seed={seed}") for seed in (1, 2) for more in ((), (BITS,), ("train.clip=0.5",))]
    assert order(recipes) == [0, 2, 1, 3, 5, 4]


def test_a_run_that_takes_weights_scores_as_if_it_had_trained_them(house):
    folder, alone = house / "two", house.parent / "alone"
    recipe = tiny_recipe(BITS, "proof_bytes=0", "baselines=false")
    with Run(folder) as run:
        prepared(recipe, run)
        assert equals(recipe, [house / "one"]) == [house / "one"]
        assert take_weights(recipe, run, [house / "one"]) == house / "one"
    taken, trained = (run_tiny(where, BITS, "proof_bytes=0", "baselines=false") for where in (folder, alone))
    assert taken.stages == trained.stages
    assert taken.artifact_sha256 == trained.artifact_sha256
    facts = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert [fact["taken_from"] for fact in facts if fact["fact"] == "train"] == ["one"]
    assert open_artifact(folder / "weights.safetensors").decoder == open_artifact(alone / "weights.safetensors").decoder
    with Run(house / "three") as run:
        prepared(recipe, run)
        assert take_weights(recipe, run, [folder]) is None, "only whoever trained them is asked"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("code", {"sha256": "another"}),
        ("device", {}),
        ("versions", {"fairway": "0.0.1"}),
        ("train_text", {"sha256": "another"}),
        ("held_out_text", {"sha256": "another"}),
        ("tokenizer", {"sha256": "another"}),
    ],
)
def test_weights_of_another_text_code_library_or_device_are_left_alone(house, tmp_path, name, value):
    recipe = tiny_recipe(BITS)
    with Run(tmp_path) as run:
        prepared(recipe, run)
        run.facts[name] = value
        assert take_weights(recipe, run, [house / "one"]) is None
    assert not (tmp_path / "weights.safetensors").exists()


def test_the_same_code_is_the_same_whatever_its_commit_is_called(house, tmp_path):
    """A recipe that is edited after a sweep began marks the commit as changed; the code is what it was."""
    recipe = tiny_recipe(BITS)
    with Run(tmp_path) as run:
        prepared(recipe, run)
        run.facts["code"] = {**run.facts["code"], "commit": "0123456789ab+"}
        assert take_weights(recipe, run, [house / "one"]) == house / "one"


@pytest.mark.parametrize(
    "change",
    [
        ("train.clip=0.5",),
        ("quant.calibration={kind='online', every=5}",),
        ("train.schedule={by='clock', seconds=9.0, warmdown=20}",),
    ],
)
def test_another_training_and_one_that_is_nobody_elses_have_no_equals(house, tmp_path, change):
    assert equals(tiny_recipe(*change), [house / "one"]) == []


def test_a_training_that_has_begun_goes_on(house, tmp_path):
    recipe = tiny_recipe(BITS)
    (tmp_path / "checkpoint.pt").touch()
    with Run(tmp_path) as run:
        prepared(recipe, run)
        assert take_weights(recipe, run, [house / "one"]) is None


def test_damaged_weights_are_left_to_their_own_run(house, tmp_path):
    shutil.copytree(house / "one", tmp_path / "damaged")
    (tmp_path / "damaged" / "weights.safetensors").write_bytes(b"cut short")
    recipe = tiny_recipe(BITS)
    with Run(tmp_path / "run") as run:
        prepared(recipe, run)
        assert take_weights(recipe, run, [tmp_path / "damaged", house / "one"]) == house / "one"
