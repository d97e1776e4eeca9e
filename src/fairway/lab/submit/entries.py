"""Finished runs, as a record sees them: one row of numbers each, and what all of one record must share."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.artifact.bundle import unpacked
from fairway.base import files
from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.base.specs import build, to_plain
from fairway.lab.finished import Finished, curve_of, differences, own_score, read_run, whole
from fairway.lab.submit.export import SCORE, TRAIN
from fairway.lab.submit.origin import Origin, origin
from fairway.lab.submit.rules import Facts, rules
from fairway.recipe import Recipe
from fairway.steps.products import ARTIFACT, RECIPE
from fairway.steps.products import SCORE as OUTCOME

SHARED = ("script", "score_script", "train_text", "held_out_text", "tokenizer")  # by all runs of a record


@dataclass(frozen=True)
class Entry(Finished):
    """A run that a record may hold. row: what the record says of it; curve: (step, loss) of training."""

    row: dict[str, Any]
    curve: list[tuple[int, float]]


def entry(folder: Path) -> Entry:
    """A run folder, read. RecipeError where the run is not finished, or its scripts, artifact or score are not its own;
    DataError where what it left cannot be read."""
    for name in (RECIPE, OUTCOME, ARTIFACT, TRAIN, SCORE):
        if not (folder / name).exists():
            remedy = "`fairway weigh RUN` writes it" if name in (TRAIN, SCORE) else "name a finished run"
            raise RecipeError(f"{folder}: {name} is missing; {remedy}")
    with Run(folder):  # nobody is at work on it
        one = read_run(folder)
    with whole(folder):
        _own_files(folder, one.facts)
        own_score(one)
        _own_recipe(folder, one.recipe)
        row, curve = _row(folder, one.recipe, one.facts, origin(folder)), list(curve_of(folder))
        json.dumps([row, one.facts], allow_nan=False)  # refused now, not when half of a record is written
    return Entry(**vars(one), row=row, curve=curve)


def _own_files(folder: Path, facts: Facts) -> None:
    scripts, packed = facts["scripts"], facts["artifact"]
    again = "`fairway pack` writes both again"
    for name, kind, digest, remedy in (
        (TRAIN, "script", scripts["train_sha256"], again),
        (SCORE, "script", scripts["score_sha256"], again),
        (ARTIFACT, "artifact", packed["sha256"], "put that back, or take this away and `fairway pack` the run again"),
    ):
        if files.sha256(folder / name) != digest:
            raise RecipeError(f"{folder / name}: not the {kind} that the run booked; {remedy}")


def _own_recipe(folder: Path, recipe: Recipe) -> None:
    """The script holds the run's recipe: `fit --code` with other settings exports another."""
    table, _ = unpacked(files.read(folder / TRAIN).decode())
    held = to_plain(build(Recipe, {**table, "seed": recipe.seed}))
    for key, (wanted, found) in differences(to_plain(recipe), held).items():
        raise RecipeError(
            f"{folder / TRAIN}: {key} = {found!r}, but {wanted!r} in the run's recipe; `fairway pack` writes both again"
        )


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
        same_data(str(one.folder), one.row, str(first.folder), first.row)


def same_data(name: str, row: Mapping[str, Any], other: str, before: Mapping[str, Any]) -> None:
    """RecipeError where two rows of one record are not of the same code, text and tokenizer."""
    for key in SHARED:
        now, then = row["sha256"][key], before["sha256"][key]
        if now != then:
            raise RecipeError(
                f"{name}: {key} {now[:12]}, but {then[:12]} in {other}; the runs of a record share code and data"
            )


def _row(folder: Path, recipe: Recipe, facts: Facts, made: Origin) -> dict[str, Any]:
    """What submission.json keeps of a run, so that the tables can be written again without it."""
    result = recipe.score.result
    scripts, booked = facts["scripts"], facts[f"score_{result}"]
    base = facts["score_sliding" if result == "adapted" else "score_quantized"]["bits_per_byte"]
    train = facts["train"]
    return {
        "seed": recipe.seed,
        "run": folder.resolve().name,
        "date": time.strftime("%Y-%m-%d", time.gmtime((folder / OUTCOME).stat().st_mtime)),
        "result": result,
        "val_bpb": booked["bits_per_byte"],
        "val_loss": booked["code_length_bits"] * math.log(2) / booked["tokens"],
        "base_bpb": base,
        "gain_bpb": base - booked["bits_per_byte"],
        "float_bpb": facts["score_float"]["bits_per_byte"],
        "tokens": booked["tokens"],
        "text_bytes": booked["text_bytes"],
        "steps": train["steps"],
        "train_seconds": train["seconds"] + train["writing_seconds"],
        "calibration_seconds": facts["calibration"]["seconds"],
        "eval_seconds": booked["seconds"],
        "artifact_bytes": facts["artifact"]["bytes"],
        "code_bytes": scripts["train_bytes"],
        "total_bytes": facts["artifact"]["bytes"] + scripts["train_bytes"],
        "budget_bytes": recipe.budget.artifact_bytes,
        "device": {key: facts["device"].get(key) for key in ("ranks", "processor", "device", "compute", "torch")},
        "commit": made.code.get("commit"),
        "sha256": {
            "script": scripts["train_sha256"],
            "score_script": scripts["score_sha256"],
            "code": made.code["sha256"],
            "artifact": facts["artifact"]["sha256"],
            "train_text": facts["train_text"].get("sha256") or f"{facts['train_text']['tokens']} tokens",
            "held_out_text": booked["text_sha256"],
            "tokenizer": facts["tokenizer"]["sha256"],
        },
        "rules": [line.plain() for line in rules(recipe, facts, made)],
        "superseded": False,
    }
