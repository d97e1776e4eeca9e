"""A recipe: everything that decides a score, one spec for each room of the house."""

from dataclasses import dataclass, field
from pathlib import Path

from fairway import forms
from fairway.artifact import PackSpec
from fairway.base import recipes
from fairway.base.errors import RecipeError
from fairway.data import DataSpec
from fairway.model import ModelSpec
from fairway.quant import FakeSpec, QuantSpec
from fairway.score import ScoreSpec
from fairway.train import TrainSpec


@dataclass(frozen=True)
class BudgetSpec:
    """Limits that are asserted while the run goes on; 0 means none."""

    artifact_bytes: int = 16_000_000
    train_seconds: float = 600.0  # from the first training step to the last read of training data
    eval_seconds: float = 600.0  # from opening the file to the last payment of the result's stage


@dataclass(frozen=True)
class Recipe:
    name: str
    summary: str = ""
    seed: int = 1337
    baselines: bool = True  # also compress the held-out text with xz, zstd, brotli and bzip2
    proof_bytes: int = 8_000  # of held-out text that is written as a file and decoded; 0: nothing is proven
    data: DataSpec = field(default_factory=DataSpec)
    model: ModelSpec = field(default_factory=ModelSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    qat: FakeSpec = field(default_factory=FakeSpec)  # quantisation-aware training
    quant: QuantSpec = field(default_factory=QuantSpec)
    pack: PackSpec = field(default_factory=PackSpec)
    score: ScoreSpec = field(default_factory=ScoreSpec)
    budget: BudgetSpec = field(default_factory=BudgetSpec)


def find(name: str) -> Path:
    """A recipe's file: a path, or the name of one in the recipes folder beside the package."""
    path = Path(name)
    if path.suffix == ".toml" or path.exists():
        return path
    home = recipes_folder()
    if home is not None and (home / f"{name}.toml").exists():
        return home / f"{name}.toml"
    raise RecipeError(f"recipe {name!r}: no such file and no such name; `fairway list recipes` shows those at hand")


def recipes_folder() -> Path | None:
    """The folder of recipes that comes with a checkout; None where fairway is installed without one."""
    for base in (Path.cwd(), Path(__file__).parents[2]):
        if (base / "recipes").is_dir():
            return base / "recipes"
    return None


def load(name: str, overrides: tuple[str, ...] = (), form: str = "") -> Recipe:
    """A recipe by name or path, `overrides` ("a.b=value") on top, checked; form: "pocket" or "wiki", its small form."""
    path = find(name)
    table = forms.table(path, form) if form else recipes.read(path)
    for name in forms.FORMS:
        table.pop(name, None)
    return recipes.finish(Recipe, table, path.stem, overrides)
