"""The small forms: what a recipe changes about b6, over B6's choices at pocket's size or wiki's, its values on top."""

from pathlib import Path

import pytest
import torch

from fairway.base.errors import RecipeError
from fairway.model import GPT, tags
from fairway.quant.plan import plan
from fairway.recipe import Recipe, load

FILES = {
    "b": 'summary = "run B"\n[model]\nwidth = 512\nhidden = 1792\n[train]\nclip = 0.3\n'
    "[pocket.quant.prune]\nfraction = 0.05\n[pocket.train]\nclip = 0.5\n",
    "b6": 'extends = "b.toml"\n[quant.prune]\nfraction = 0.10\nwhen = "before"\n',
    "small": 'summary = "a laptop\'s"\n[model]\nwidth = 128\nhidden = 96\nlayers = 2\n',
    "pocket_b6": 'extends = "small.toml"\nsummary = "on a laptop"\n[quant.prune]\nfraction = 0.10\nwhen = "before"\n'
    "[wiki.budget]\nartifact_bytes = 2000000\n",
    "wiki": 'extends = "small.toml"\nsummary = "more text"\n[model]\nlayers = 5\n',
    "approaches/a": 'extends = "../b6.toml"\nsummary = "gated"\n[model]\nmlp = "swiglu"\nhidden = 1024\n'
    "[pocket.model]\nhidden = 64\n[pocket.train]\nclip = 0.7\n[wiki.model]\nhidden = 80\n",
    "approaches/a1": 'extends = "a.toml"\n[train]\nclip = 0.9\n[pocket.train]\nbatch_tokens = 4096\n',
    "approaches/early": 'extends = "../b.toml"\n[train]\nclip = 0.2\n',
    "other": "[model]\nwidth = 32\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "approaches").mkdir()
    for name, text in FILES.items():
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path


def pocket(folder: Path, name: str, *overrides: str) -> Recipe:
    return load(str(folder / f"{name}.toml"), overrides, "pocket")


def test_an_approach_keeps_its_difference_and_takes_the_rest_from_the_stand_in(folder: Path) -> None:
    found = pocket(folder, "approaches/a")
    assert type(found.model.mlp).__module__.endswith("swiglu")
    assert (found.model.width, found.model.layers) == (128, 2), "of pocket_b6 and its parent, not of b"
    assert found.model.hidden == 64, "its [pocket] table stands above its difference"
    assert found.train.clip == 0.7
    assert found.quant.prune.fraction == 0.10
    assert (found.name, found.summary) == ("pocket_a", "gated")


def test_a_pocket_table_is_inherited_below_b6_and_stands_above_every_difference(folder: Path) -> None:
    found = pocket(folder, "approaches/a1")
    assert found.model.hidden == 64
    assert found.train.batch_tokens == 4096
    assert found.train.clip == 0.7, "a's [pocket] comes after a1's difference"
    assert found.name == "pocket_a1"


def test_b6_is_the_stand_in_as_it_is(folder: Path) -> None:
    assert pocket(folder, "b6") == load(str(folder / "pocket_b6.toml"))


def test_b_is_the_stand_in_with_its_own_pocket_table_which_b6_does_not_inherit(folder: Path) -> None:
    found = pocket(folder, "b")
    assert (found.quant.prune.fraction, found.train.clip, found.model.width) == (0.05, 0.5, 128)
    assert (found.name, found.summary) == ("pocket_b", "run B")
    early = pocket(folder, "approaches/early")
    assert (early.quant.prune.fraction, early.train.clip) == (0.05, 0.2), "what extends b alone starts from b's form"


def test_the_wiki_form_has_the_choices_of_the_stand_in_on_the_text_and_shape_of_wiki(folder: Path) -> None:
    found = load(str(folder / "b6.toml"), form="wiki")
    assert (found.model.layers, found.model.width, found.quant.prune.fraction) == (5, 128, 0.10)
    assert (found.budget.artifact_bytes, found.name) == (2_000_000, "wiki_b6"), "the stand-in's own [wiki] table"
    assert pocket(folder, "b6").budget.artifact_bytes == 16_000_000, "which says nothing to the pocket form"


def test_in_the_wiki_form_a_wiki_table_stands_above_the_pocket_table(folder: Path) -> None:
    found = load(str(folder / "approaches" / "a.toml"), form="wiki")
    assert (found.model.hidden, found.train.clip, found.model.layers) == (80, 0.7, 5)
    assert load(str(folder / "b.toml"), form="wiki").train.clip == 0.5


def test_without_a_form_its_tables_say_nothing(folder: Path) -> None:
    found = load(str(folder / "approaches" / "a1.toml"))
    assert (found.name, found.model.hidden, found.train.clip) == ("a1", 1024, 0.9)
    assert pocket(folder, "approaches/a").model.hidden == 64


def test_overrides_stand_above_all(folder: Path) -> None:
    assert pocket(folder, "approaches/a", "model.hidden=32", "name=mine").model.hidden == 32
    assert pocket(folder, "approaches/a", "name=mine").name == "mine"


@pytest.mark.parametrize("name", ["other", "pocket_b6"])
def test_a_recipe_outside_the_family_has_no_pocket_form(folder: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"{name}\.toml: extends neither b6\.toml nor b\.toml"):
        pocket(folder, name)


def test_a_stand_in_that_is_missing_is_named(folder: Path) -> None:
    (folder / "pocket_b6.toml").unlink()
    with pytest.raises(RecipeError, match=r"pocket_b6\.toml: not there; a pocket form needs it beside b6\.toml"):
        pocket(folder, "approaches/a")


def test_a_pocket_that_is_no_table_is_refused(folder: Path) -> None:
    (folder / "approaches" / "a.toml").write_text('extends = "../b6.toml"\npocket = 3\n')
    with pytest.raises(RecipeError, match=r"a\.toml: pocket = 3: a table is expected"):
        pocket(folder, "approaches/a")


RECIPES = Path(__file__).parent.parent / "recipes"
FAMILY = [path for folder in ("approaches", "findings", "repairs") for path in (RECIPES / folder).glob("*.toml")]


def projections_in_float16(recipe: Recipe) -> set[str]:
    with torch.device("meta"):
        model = GPT(recipe.model, recipe.data.tokenizer.vocab)
    found = tags(model)
    left = {name for name, grid in plan(model, recipe.quant).items() if grid is None}
    return {found[name].part for name in left if found[name].role in ("matrix", "table")}


@pytest.mark.parametrize("form", ["pocket", "wiki"])
@pytest.mark.parametrize("path", FAMILY, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_small_form_quantises_what_the_large_one_quantises(path: Path, form: str) -> None:
    """With two of four heads k and v once were as small as the limit below which pocket_b6 leaves a tensor alone."""
    assert projections_in_float16(load(str(path), form=form)) == projections_in_float16(load(str(path)))
