"""Equal trainings are made once: a run of a sweep takes the weights of another that trained the very same model.

Approaches that differ only in what comes after training (grids, pruning, coders, adaptation) share their float weights:
for one seed, one machine and one version of the code these are equal to the bit anyway. The journal says where they
were trained. Hessians are gathered again, each run by its own recipe.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fairway.artifact import open_artifact, write_weights
from fairway.base import folders, recipes, tables
from fairway.base.errors import FairwayError
from fairway.base.journal import CURVES, JOURNAL, Run
from fairway.base.specs import to_plain
from fairway.recipe import Recipe
from fairway.steps.products import RECIPE, WEIGHTS, decoder_share
from fairway.train.loop import CHECKPOINT

WITHOUT = ("taken_from",)  # no training fact: as good as taken


def share(recipe: Recipe) -> str:
    """A hash of all that decides the float weights: seed, data, model, training; and how quantising meets training,
    where it does (fake grids, Hessians gathered on the way)."""
    table = to_plain(recipe)
    decides = {name: table[name] for name in ("seed", "data", "model", "train", "qat")}
    calibration = table["quant"]["calibration"]
    if recipe.qat.kind != "off" or calibration["kind"] == "online":
        decides["quant"] = table["quant"]
    return tables.sha256(decides)


def order(recipes: Iterable[Recipe]) -> list[int]:
    """The order in which runs begin: first one of every training, then those that can take its weights."""
    seen: dict[str, int] = {}
    turns = []
    for place, recipe in enumerate(recipes):
        turn = seen[share(recipe)] = seen.get(share(recipe), -1) + 1
        turns.append((recipe.seed, turn, place))
    seeds = list(dict.fromkeys(seed for seed, _, _ in turns))
    return [place for _, _, place in sorted(turns, key=lambda one: (seeds.index(one[0]), one[1], one[2]))]


def take_weights(recipe: Recipe, run: Run, others: Iterable[Path], made: Mapping[str, Any]) -> Path | None:
    """Puts the weights of an equal training into the run's folder, where one of `others` (run folders) has them.

    made: what this run's journal will say of its `code` and `device`; weights made otherwise are left alone. None where
    there are none to take, or where this run has begun a training of its own.
    """
    if run.path(WEIGHTS).exists() or "train" in run.facts or run.path(CHECKPOINT).exists():
        return None
    wanted = share(recipe)
    for folder in others:
        facts = _facts(folder)
        trained = (folder / WEIGHTS).exists() and "model" in facts and "taken_from" not in facts.get("train", WITHOUT)
        if trained and all(facts.get(name) == made[name] for name in made) and _share_of(folder) == wanted:
            opened = open_artifact(folder / WEIGHTS)
            write_weights(run.path(WEIGHTS), opened.model(), opened.tokenizer, decoder_share(recipe))
            for row in folders.rows(folder / CURVES):
                folders.append(run.path(CURVES), row)
            run.fact("model", **facts["model"])
            run.fact("train", **facts["train"], taken_from=folder.name)
            return folder
    return None


def _facts(folder: Path) -> dict[str, dict[str, Any]]:
    """The last fact of every name, without its time."""
    found = {}
    for row in folders.rows(folder / JOURNAL):
        row.pop("time", None)
        found[row.pop("fact", "")] = row
    return found


def _share_of(folder: Path) -> str | None:
    try:
        return share(recipes.load(Recipe, folder / RECIPE))
    except FairwayError:  # a run of another version, whose keys are not ours
        return None
