"""Finished runs, as a record sees them: one row of numbers each, and what all of one record must share."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.base import files, recipes
from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.base.specs import to_plain
from fairway.lab.submit.export import SCORE, TRAIN
from fairway.lab.submit.rules import rules
from fairway.recipe import Recipe
from fairway.steps.products import RECIPE
from fairway.steps.products import SCORE as OUTCOME

HASHES = ("script", "score_script", "artifact", "train_text", "held_out_text", "tokenizer")
SHARED = ("script", "score_script", "train_text", "held_out_text", "tokenizer")  # by all runs of a record


@dataclass(frozen=True)
class Entry:
    """A finished run. table: its resolved recipe; row: what the record says of it; curve: (step, loss) of training."""

    folder: Path
    recipe: Recipe
    table: dict[str, Any]
    facts: dict[str, dict[str, Any]]
    row: dict[str, Any]
    curve: list[tuple[int, float]]


def entry(folder: Path) -> Entry:
    """A run folder, read. RecipeError where the run is not finished, or its scripts or its artifact are not its own."""
    for name in (RECIPE, OUTCOME, TRAIN, SCORE):
        if not (folder / name).exists():
            remedy = "`fairway weigh RUN` writes it" if name in (TRAIN, SCORE) else "name a finished run"
            raise RecipeError(f"{folder}: {name} is missing; {remedy}")
    recipe = recipes.load(Recipe, folder / RECIPE)
    with Run(folder) as run:
        facts = run.facts
    outcome = json.loads((folder / OUTCOME).read_text())
    row = _row(folder, recipe, facts, outcome)
    booked = facts.get("scripts", {})
    for name, fact in ((TRAIN, "train_sha256"), (SCORE, "score_sha256")):
        if booked.get(fact) != files.sha256(folder / name):
            raise RecipeError(f"{folder / name}: not the script that the run booked; `fairway pack` writes both again")
    return Entry(folder, recipe, to_plain(recipe), facts, row, list(_curve(folder)))


def share(entries: list[Entry]) -> None:
    """RecipeError naming what differs between runs that one record cannot hold together."""
    first = entries[0]
    seeds: dict[int, Path] = {}
    for one in entries:
        if one.row["seed"] in seeds:
            raise RecipeError(
                f"{one.folder}: seed {one.row['seed']} as {seeds[one.row['seed']]} has; name one run for each seed"
            )
        seeds[one.row["seed"]] = one.folder
        for key, (before, now) in differences(first.table, one.table).items():
            if key != "seed":
                raise RecipeError(
                    f"{one.folder}: {key} = {now!r}, but {before!r} in {first.folder}; "
                    "the runs of a record share all but the seed"
                )
        for name in SHARED:
            if first.row["sha256"][name] != one.row["sha256"][name]:
                raise RecipeError(
                    f"{one.folder}: {name} {one.row['sha256'][name][:12]}, but {first.row['sha256'][name][:12]} in "
                    f"{first.folder}; the runs of a record share code and data"
                )


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{place: (before, after)} of two plain tables; None for what one of them lacks."""
    old, new = dict(flat(before)), dict(flat(after))
    return {key: (old.get(key), new.get(key)) for key in [*old, *new] if old.get(key) != new.get(key)}


def flat(table: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """(place in dotted form, value) of all leaves; lists of tables are numbered."""
    for key, value in table.items():
        where = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping):
            yield from flat(value, where)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield from flat({f"{number}": item for number, item in enumerate(value)}, where)
        else:
            yield where, value


def _row(folder: Path, recipe: Recipe, facts: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
    """What submission.json keeps of a run, so that the tables can be written again without it."""
    result, stages = outcome["result"], outcome["stages"]
    base = stages["sliding" if result == "adapted" else "quantized"]
    scripts, booked = facts["scripts"], facts[f"score_{result}"]
    train = facts["train"]
    return {
        "seed": recipe.seed,
        "run": folder.resolve().name,
        "date": time.strftime("%Y-%m-%d", time.gmtime((folder / OUTCOME).stat().st_mtime)),
        "result": result,
        "val_bpb": outcome["bits_per_byte"],
        "val_loss": outcome["code_length_bits"] * math.log(2) / outcome["tokens"],
        "base_bpb": base,
        "gain_bpb": base - outcome["bits_per_byte"],
        "float_bpb": stages["float"],
        "tokens": outcome["tokens"],
        "text_bytes": outcome["text_bytes"],
        "steps": train["steps"],
        "train_seconds": train["seconds"] + train["writing_seconds"],
        "calibration_seconds": facts["calibration"]["seconds"],
        "eval_seconds": booked["seconds"],
        "artifact_bytes": facts["artifact"]["bytes"],
        "code_bytes": scripts["train_bytes"],
        "total_bytes": facts["artifact"]["bytes"] + scripts["train_bytes"],
        "budget_bytes": recipe.budget.artifact_bytes,
        "device": {key: facts["device"].get(key) for key in ("ranks", "processor", "device", "compute", "torch")},
        "commit": facts["code"].get("commit"),
        "sha256": {
            "script": scripts["train_sha256"],
            "score_script": scripts["score_sha256"],
            "code": facts["code"]["sha256"],
            "artifact": facts["artifact"]["sha256"],
            "train_text": facts["train_text"].get("sha256") or f"{facts['train_text']['tokens']} tokens",
            "held_out_text": booked["text_sha256"],
            "tokenizer": facts["tokenizer"]["sha256"],
        },
        "rules": [line.plain() for line in rules(recipe, facts)],
        "superseded": False,
    }


def _curve(folder: Path) -> Iterator[tuple[int, float]]:
    path = folder / "curves.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        point = json.loads(line)
        if point.get("curve") == "train":
            yield int(point["step"]), float(point["loss"])
