"""`quant.prune.budget`: the least share of weights set to zero whose file fits."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fairway.artifact import open_artifact
from fairway.artifact.integers import read_integers
from fairway.base.errors import BudgetError, RecipeError
from fairway.base.journal import Run
from fairway.quant import PruneSpec, quantize
from fairway.quant.observe import read_hessians
from fairway.steps.products import HESSIANS, INTEGERS, WEIGHTS
from fairway.steps.pruned import NEAR, prune_run
from tests.tiny.way import run_tiny, tiny_recipe


@pytest.fixture(scope="module")
def trained(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    for name in (WEIGHTS, HESSIANS):
        shutil.copy(tiny_run / name, folder / name)
    return folder


def pruned(folder: Path, budget: int, fraction: float = 0.0):
    """(the fact, the integers) of the tiny run's weights."""
    recipe = tiny_recipe("pack.coder=rans", f"quant.prune={{when='after', fraction={fraction}, budget={budget}}}")
    model, hessians = open_artifact(folder / WEIGHTS).model(), read_hessians(folder / HESSIANS)
    with Run(folder) as run:
        prune_run(recipe, run, model, hessians)
        fact = run.facts["pruned"]
    same = replace(recipe.quant, prune=PruneSpec("after" if fact["fraction"] else "never", fact["fraction"]))
    expected = quantize(model, hessians, same, Run(quiet=True))
    found = read_integers(folder / INTEGERS)
    for name, value in expected.items():
        if hasattr(value, "codes"):
            assert (found[name].codes == value.codes).all(), "the integers are those of the share that is booked"
    assert not list(folder.glob("*.fw")), "trial files are taken away"
    return fact


def test_a_file_that_fits_is_left_as_it_is(trained):
    fact = pruned(trained, 100_000)
    assert (fact["fraction"], fact["solves"], fact["writings"]) == (0.0, 1, 1)


def test_more_is_pruned_until_the_file_fits_and_no_more_than_that(trained):
    whole = pruned(trained, 100_000)["bytes"]
    fact = pruned(trained, whole - 3_000)
    assert 0 < fact["fraction"] < 0.6
    assert (1 - 3 * NEAR) * (whole - 3_000) < fact["bytes"] <= whole - 3_000
    assert fact["writings"] <= 3


def test_the_share_that_a_recipe_begins_with_is_the_least(trained):
    assert pruned(trained, 100_000, fraction=0.2)["fraction"] == 0.2


def test_a_budget_that_no_share_meets_is_refused_with_the_last_file_s_size(trained):
    with pytest.raises(BudgetError, match=r"budget = 3,000: with 99% pruned the file has [\d,]+ bytes; raise it"):
        pruned(trained, 3_000)


def test_two_ways_to_meet_a_budget_are_refused():
    with pytest.raises(RecipeError, match=r"prune\.budget and fit\.budget: two ways"):
        tiny_recipe("quant.prune.budget=9000", "quant.fit.budget=9000")


def test_a_run_goes_on_from_there_to_its_score(tmp_path):
    outcome = run_tiny(tmp_path / "run", "quant.prune.budget=36000", "pack.coder=rans", "proof_bytes=0")
    assert outcome.artifact_bytes <= 36_000
    assert outcome.bits_per_byte < 8
