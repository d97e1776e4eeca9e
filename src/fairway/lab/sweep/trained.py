"""Equal trainings are made once: a run of a sweep takes the weights of another that trained the very same model.

Approaches that differ only in what comes after training (grids, pruning, coders, adaptation) share their float weights:
for one seed, text, machine and version of the code these are equal to the bit anyway, where the schedule goes by steps.
The journal says where they were trained, and with it stand the seconds that it took there. Hessians are gathered again,
each run by its own recipe.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fairway.artifact import open_artifact, write_weights
from fairway.base import folders, recipes, slots, tables
from fairway.base.errors import FairwayError
from fairway.base.journal import CURVES, JOURNAL, Run
from fairway.base.specs import to_plain
from fairway.recipe import Recipe
from fairway.steps.products import RECIPE, WEIGHTS, decoder_share
from fairway.train.loop import CHECKPOINT

MADE_OF = ("code", "versions", "device", "train_text", "held_out_text", "tokenizer")  # facts that must agree


def share(recipe: Recipe) -> str:
    """A hash of all that decides the float weights: seed, data, model, training; and how quantising meets training,
    where it does (fake grids, Hessians gathered on the way)."""
    table = to_plain(recipe)
    decides = {name: table[name] for name in ("seed", "data", "model", "train", "qat")}
    if recipe.qat.kind != "off" or slots.kind_of(recipe.quant.calibration) == "online":
        decides["quant"] = table["quant"]
    return tables.sha256(decides)


def training_of(recipe: Recipe) -> str:
    """`share` where equal trainings end alike: by steps. By the clock each is its own: ""."""
    return share(recipe) if recipe.train.schedule.by == "steps" else ""


def own_seconds(folder: Path) -> float:
    """What the run in this folder spent on a training of its own: 0 where it took another's weights."""
    fact = _facts(folder).get("train", {})
    return 0.0 if "taken_from" in fact else float(fact.get("seconds", 0.0))


def order(recipes: Iterable[Recipe]) -> list[int]:
    """The order in which runs begin: first one of every training, then those that can take its weights."""
    seen: dict[str, int] = {}
    turns = []
    for place, recipe in enumerate(recipes):
        turn = seen[share(recipe)] = seen.get(share(recipe), -1) + 1
        turns.append((recipe.seed, turn, place))
    seeds = list(dict.fromkeys(seed for seed, _, _ in turns))
    return [place for _, _, place in sorted(turns, key=lambda one: (seeds.index(one[0]), one[1], one[2]))]


def equals(recipe: Recipe, others: Iterable[Path]) -> list[Path]:
    """The run folders among some whose training is that of `recipe`; none where its weights are its own: a schedule by
    clock ends where it ends, and Hessians that are gathered while training lie in nobody else's folder."""
    if recipe.train.schedule.by == "clock" or slots.kind_of(recipe.quant.calibration) == "online":
        return []
    wanted = share(recipe)
    return [folder for folder in others if (folder / WEIGHTS).exists() and _share_of(folder) == wanted]


def take_weights(recipe: Recipe, run: Run, others: Iterable[Path]) -> Path | None:
    """Puts the weights of an equal training into the folder of a run that is prepared, where one of `others` has them.

    Weights that were trained on another text or with another tokenizer, code, library or device are left alone, and so
    is a run that has begun a training of its own: None.
    """
    if "train" in run.facts or run.path(CHECKPOINT).exists():
        return None
    for folder in others:
        facts = _facts(folder)
        trained = facts.get("train", {})
        equal = _made_of(facts) == _made_of({name: plain(run.facts[name]) for name in MADE_OF})
        if not (equal and trained and "model" in facts and "taken_from" not in trained):
            continue
        try:
            opened = open_artifact(folder / WEIGHTS)
        except FairwayError:  # damaged: that run will say so itself
            continue
        write_weights(run.path(WEIGHTS), opened.model(), opened.tokenizer, decoder_share(recipe))
        run.path(CURVES).unlink(missing_ok=True)
        for row in folders.rows(folder / CURVES):
            folders.append(run.path(CURVES), row)
        run.fact("model", **facts["model"])
        run.fact("train", **trained, taken_from=folder.name)
        return folder
    return None


def _made_of(facts: Mapping[str, Any]) -> list[Any]:
    """Of the code its hash: its commit's name also changes with files that are no code, such as a recipe's."""
    code = facts.get("code")
    return [code and code.get("sha256"), *(facts.get(name) for name in MADE_OF[1:])]


def plain(fact: Mapping[str, Any]) -> Any:
    """A fact as a journal gives it back."""
    return json.loads(json.dumps(fact, default=str))


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
