"""What lies in a run folder, and when it may be taken up."""

from dataclasses import dataclass
from pathlib import Path

from fairway.base import tables
from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.base.specs import to_plain
from fairway.data import Tokenizer, Tokens
from fairway.recipe import Recipe

RECIPE, WEIGHTS, HESSIANS, INTEGERS, ARTIFACT, SCORE = (
    "recipe.toml",
    "weights.safetensors",
    "hessians.safetensors",
    "integers.safetensors",
    "artifact.fw",
    "score.json",
)


@dataclass(frozen=True)
class Text:
    """What a run reads."""

    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens


def decoder_share(recipe: Recipe) -> dict[str, object]:
    """The decoder's share of the recipe: what a score is computed with, as it stands in the artifact."""
    return {"recipe": recipe.name, "score": to_plain(recipe.score)}


def done(run: Run, product: str, fact: str) -> bool:
    """Whether a step's product and its fact are both there (the same answer on every rank)."""
    there = run.folder is not None and run.path(product).exists() and fact in run.facts
    return run.ranks.max(float(there)) > 0


def same_recipe(recipe: Recipe, run: Run) -> None:
    """Products of another recipe are never taken up: not even where recipe.toml was edited in the run folder."""
    began = run.facts.get("run", {}).get("recipe_sha256")
    if began is not None and began != tables.sha256(to_plain(recipe)):
        raise RecipeError(
            f"{run.folder}: its products come from another recipe ({RECIPE} was edited) or version; start a new run"
        )


def product(run: Run, name: str) -> Path:
    """The place of a product that is there; RecipeError where it is not."""
    path = run.path(name)
    if not path.exists():
        raise RecipeError(f"{path}: not there yet; take the step that writes it first, or `fairway run --resume`")
    return path


def tidy(run: Run, *names: str) -> None:
    """Takes products away that are stale."""
    if run.writes:
        for name in names:
            run.path(name).unlink(missing_ok=True)
