"""Run folders, recipes and ranks, as every verb opens them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fairway import steps
from fairway.base import recipes
from fairway.base.devices import Device, choose
from fairway.base.errors import FairwayError, RecipeError
from fairway.base.folders import new_folder
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.lab import logs
from fairway.recipe import Recipe
from fairway.verbs.bar import bar


def recipe_of(folder: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The resolved recipe of a run folder."""
    path = folder / steps.RECIPE
    if not path.exists():
        raise RecipeError(f"{folder}: no run folder ({steps.RECIPE} is missing); name one under runs/")
    return recipes.load(Recipe, path, overrides)


@contextmanager
def ranks_on(device: str) -> Iterator[tuple[Ranks, Device]]:
    ranks = Ranks.start(cuda=device != "cpu" and torch.cuda.is_available())
    try:
        yield ranks, choose(device, ranks.local_rank)
    finally:
        ranks.stop()


def run_of(
    one: Recipe, root: Path, ranks: Ranks, quiet: bool = False, folder: Path | None = None, log: str = ""
) -> Run:
    """The run of a folder, a new one where none is given; every rank has the same. log: tensorboard or wandb, where
    its points and facts go too."""
    if log:
        logs.check(log)
    if folder is None:
        made = ""
        if ranks.first:
            try:
                made = str(new_folder(root, one.name, one.seed))
            except FairwayError as error:
                made = f"error: {error}"
        made = ranks.share_text(made)
        if made.startswith("error: "):
            raise RecipeError(made.removeprefix("error: "))
        folder = Path(made)
    return logs.LoggedRun(folder, ranks, quiet, bar, log) if log else Run(folder, ranks, quiet, bar)
