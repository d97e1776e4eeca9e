"""Recipes: small differences from a parent, single values by --set, and mistakes named with their place and remedy."""

import string
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.base import recipes, slots
from fairway.base.errors import RecipeError
from fairway.base.specs import build, choice, choices, to_plain

SLOT = "house_of_tests.shapes"


@pytest.fixture(scope="module", autouse=True)
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A slot with two techniques, one whose package is missing, and a helper that is no technique."""
    root = tmp_path_factory.mktemp("slots")
    folder = root / "house_of_tests" / "shapes"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    head = "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Spec:\n"
    (folder / "square.py").write_text(head + "    side: float = 1.0\n")
    (folder / "ring.py").write_text(
        head + "    outer: float = 2.0\n    inner: float = 1.0\n\n    def __post_init__(self):\n"
        "        if self.inner >= self.outer:\n            raise ValueError('inner is not below outer')\n"
    )
    (folder / "fetched.py").write_text("import no_such_package_anywhere\n\n" + head + "    pass\n")
    (folder / "_helper.py").write_text("WORDS = 1\n")
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))
    for name in [name for name in sys.modules if name.startswith("house_of_tests")]:
        del sys.modules[name]


@dataclass(frozen=True)
class Train:
    steps: int = 100
    lr: float = 0.02  # per step
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None
    when: Literal["early", "late"] = "late"
    compile: bool = False


@dataclass(frozen=True)
class Recipe:
    name: str = ""
    train: Train = field(default_factory=Train)
    shape: Any = choice(SLOT, "square")
    trim: Any = choices(SLOT)
    plan: dict[str, Train] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.toml"


# Inheritance.


def test_a_recipe_is_a_small_difference_from_its_parent(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        child='extends = "parent.toml"\n[train]\nlr = 0.5',
        parent='extends = "grandparent.toml"\n[train]\nsteps = 7',
        grandparent='name = "old"\n[train]\nsteps = 3\nlr = 0.1\nbetas = [0.5, 0.6]',
    )
    recipe = recipes.load(Recipe, path)
    assert recipe.train == Train(steps=7, lr=0.5, betas=(0.5, 0.6))
    assert recipe.name == "child"  # a parent's name is not inherited


def test_one_value_set_on_the_command_line_is_on_top(tmp_path: Path) -> None:
    path = written(tmp_path, r="[train]\nlr = 0.5\nsteps = 9")
    recipe = recipes.load(Recipe, path, ["train.lr=1", "name=bare word", "train.betas=[0.1, 0.2]", "shape.kind=ring"])
    assert (recipe.train.lr, recipe.train.steps, recipe.train.betas) == (1.0, 9, (0.1, 0.2))
    assert isinstance(recipe.train.lr, float)
    assert recipe.name == "bare word"
    assert slots.kind_of(recipe.shape) == "ring"


def test_a_table_of_the_same_kind_is_merged_and_another_kind_replaces_it(tmp_path: Path) -> None:
    parent = '[shape]\nkind = "ring"\nouter = 9.0\ninner = 3.0'
    for child, expected in {
        "[shape]\ninner = 4.0": {"kind": "ring", "outer": 9.0, "inner": 4.0},
        'shape = "ring"': {"kind": "ring", "outer": 9.0, "inner": 3.0},
        '[shape]\nkind = "ring"\nouter = 8.0': {"kind": "ring", "outer": 8.0, "inner": 3.0},
        'shape = "square"': {"kind": "square", "side": 1.0},
        '[shape]\nkind = "square"\nside = 5.0': {"kind": "square", "side": 5.0},
    }.items():
        path = written(tmp_path, child=f'extends = "parent.toml"\n{child}', parent=parent)
        assert (
            to_plain(recipes.load(Recipe, path).shape) | {"kind": slots.kind_of(recipes.load(Recipe, path).shape)}
            == expected
        )


def test_own_keys_may_be_laid_over_a_parents_bare_name(tmp_path: Path) -> None:
    path = written(tmp_path, child='extends = "parent.toml"\n[shape]\nouter = 7.0', parent='shape = "ring"')
    assert recipes.load(Recipe, path).shape.outer == 7.0


def test_a_circle_of_parents_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, a='extends = "b.toml"', b='extends = "c.toml"', c='extends = "a.toml"')
    with pytest.raises(RecipeError, match=r"a\.toml: extends itself through a\.toml -> b\.toml -> c\.toml"):
        recipes.read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('extends = "absent.toml"', r"absent\.toml: no such file; `fairway list recipes`"),
        ("extends = 3", "one parent's file name"),
        ("[train", "recipe .*r.toml: "),
        ("a = 1\na = 2", "recipe .*r.toml: "),
    ],
)
def test_a_recipe_that_cannot_be_read_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        recipes.load(Recipe, written(tmp_path, r=text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_a_recipe_error(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "r.toml", tmp_path):  # and a folder
        with pytest.raises(RecipeError, match="recipe "):
            recipes.load(Recipe, path)


# Mistakes.


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.stepz=3", r"^train\.stepz: unknown key \(did you mean 'steps'\?\)$"),
        ("trian.steps=3", r"^trian: unknown key \(did you mean 'train'\?\)$"),
        ("train.zzz=3", r"^train\.zzz: unknown key; known: steps, lr, "),
        ("train.steps=3.5", r"^train\.steps = 3\.5: "),
        ("train.steps=true", r"^train\.steps = True: "),
        ("train.compile=1", r"^train\.compile = 1: "),
        ("train.lr=true", r"^train\.lr = True: "),
        ("train.lr='0.1'", r"^train\.lr = '0\.1': "),
        ("train.betas=[0.1]", r"^train\.betas"),
        ("train.betas=[0.1, 'x']", r"^train\.betas\[1\]"),
        ("train.when=soon", r"^train\.when = 'soon'; choices: early, late$"),
        ("train=3", r"^train = 3: a table is expected"),
        ("shape=squar", r"^shape = 'squar': no such technique \(did you mean 'square'\?\); choices: "),
        ("shape=../square", "no such technique"),
        ("shape=fetched", r"^shape = 'fetched' needs the package 'no_such_package_anywhere': pip install"),
        ("shape=_helper", "no such technique"),
        ("shape.side=2", r"^shape = .*a technique's name, or a table with `kind`"),
        ("shape={kind='square', sid=1}", r"^shape\.sid: unknown key \(did you mean 'side'\?\)"),
        ("shape={kind='ring', inner=3.0}", r"^shape: inner is not below outer$"),
        ("trim=ring", "^trim = 'ring': a list of techniques"),
        ("trim=['ring', 'rong']", r"^trim\[1\] = 'rong': no such technique"),
        ("plan.q.stepz=1", r"^plan\.q\.stepz: unknown key"),
        ("train.lr", "write key=value"),
        ("=3", "write key=value"),
        ("train..lr=3", "write key=value"),
    ],
)
def test_a_mistake_is_named_with_place_value_and_remedy(tmp_path: Path, setting: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        recipes.load(Recipe, written(tmp_path, r=""), [setting])
    assert "\n" not in str(caught.value)


def test_a_value_without_default_that_is_missing_is_named() -> None:
    @dataclass(frozen=True)
    class Needs:
        path: str

    with pytest.raises(RecipeError, match="path is missing"):
        build(Needs, {})


# There and back.

NUMBERS = st.floats(allow_nan=False) | st.integers(-(2**62), 2**62).map(float)
TRAINS = st.builds(
    Train,
    steps=st.integers(-(2**62), 2**62),
    lr=NUMBERS,
    betas=st.tuples(NUMBERS, NUMBERS),
    clip=st.none() | NUMBERS,
    when=st.sampled_from(["early", "late"]),
    compile=st.booleans(),
)
TEXT = st.text(st.characters(exclude_categories=("Cs",)))
PLANS = st.dictionaries(TEXT, TRAINS, max_size=3)


@given(TRAINS, TEXT, PLANS, st.lists(TEXT).map(tuple))
def test_a_dumped_recipe_reads_back_equal(train: Train, name: str, plan: dict[str, Train], notes: tuple[str]) -> None:
    recipe = Recipe(name=name, train=train, plan=plan, notes=notes)
    table = tomllib.loads(recipes.dump(to_plain(recipe)))
    assert recipes.check(Recipe, table) == recipe
    assert build(Recipe, to_plain(recipe)) == recipe  # and by the standard library alone, None included


def test_techniques_travel_through_a_plain_table() -> None:
    table = {"shape": {"kind": "ring", "outer": 5}, "trim": ["square", {"kind": "ring", "inner": 0.5}]}
    for read in (recipes.check, build):
        recipe = read(Recipe, table)
        plain = to_plain(recipe)
        assert plain["shape"] == {"kind": "ring", "outer": 5.0, "inner": 1.0}
        assert [item["kind"] for item in plain["trim"]] == ["square", "ring"]
        assert read(Recipe, tomllib.loads(recipes.dump(plain))) == recipe


def test_not_a_number_can_be_written() -> None:
    assert tomllib.loads(recipes.dump({"a": float("nan"), "b": float("-inf")}))["b"] == float("-inf")


@given(st.dictionaries(st.text(string.ascii_letters, min_size=1), st.integers()))
def test_the_hash_of_a_recipe_does_not_depend_on_the_order_of_its_keys(table: dict[str, int]) -> None:
    assert recipes.sha256(table) == recipes.sha256(dict(reversed(table.items())))


def test_the_plain_check_and_the_strict_one_agree_on_what_they_refuse() -> None:
    for table in (
        {"train": {"steps": 1.5}},
        {"train": {"steps": True}},
        {"train": {"when": "soon"}},
        {"train": {"betas": [0.1]}},
        {"train": {"clip": "x"}},
        {"notes": "text"},
    ):
        for read in (recipes.check, build):
            with pytest.raises(RecipeError):
                read(Recipe, table)


def test_a_literal_one_is_not_true() -> None:
    @dataclass(frozen=True)
    class Bits:
        count: Literal[1, 2]

    for read in (recipes.check, build):
        assert read(Bits, {"count": 1}) == Bits(1)
        with pytest.raises(RecipeError):
            read(Bits, {"count": True})


# Slots.


def test_the_folder_is_the_registry() -> None:
    assert slots.kinds(SLOT) == ["fetched", "ring", "square"]  # the helper has no Spec
    assert slots.module_of(slots.technique(SLOT, "ring").Spec()).__name__ == f"{SLOT}.ring"
