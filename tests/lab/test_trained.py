"""Runs of a sweep that train the very same model do so once."""

import json

import pytest

from fairway.artifact import open_artifact
from fairway.base.devices import choose
from fairway.base.journal import Run
from fairway.lab.submit import checkout
from fairway.lab.sweep.trained import order, share, take_weights
from tests.tiny.way import run_tiny, tiny_recipe

BITS = "quant.matrix.bits=4"


def made():
    return {"code": checkout().describe(), "device": {"ranks": 1, **choose("cpu").describe()}}


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
        assert take_weights(recipe, run, [house / "one"], made()) == house / "one"
    taken, trained = (run_tiny(where, BITS, "proof_bytes=0", "baselines=false") for where in (folder, alone))
    assert taken.stages == trained.stages
    assert taken.artifact_sha256 == trained.artifact_sha256
    facts = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert [fact["taken_from"] for fact in facts if fact["fact"] == "train"] == ["one"]
    assert open_artifact(folder / "weights.safetensors").decoder == open_artifact(alone / "weights.safetensors").decoder
    with Run(house / "three") as run:
        assert take_weights(recipe, run, [folder], made()) is None, "only whoever trained them is asked"


@pytest.mark.parametrize(
    ("change", "otherwise"),
    [("train.clip=0.5", {}), (BITS, {"code": {"commit": "another", "sha256": "another"}}), (BITS, {"device": {}})],
)
def test_weights_of_another_training_code_or_device_are_left_alone(house, tmp_path, change, otherwise):
    with Run(tmp_path) as run:
        assert take_weights(tiny_recipe(change), run, [house / "one"], made() | otherwise) is None
    assert not (tmp_path / "weights.safetensors").exists()


def test_a_training_that_has_begun_goes_on(house, tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    with Run(tmp_path) as run:
        assert take_weights(tiny_recipe(BITS), run, [house / "one"], made()) is None
