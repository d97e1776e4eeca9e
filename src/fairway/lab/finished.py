"""Finished runs, read as they lie there: what `compare` and `submit` begin with."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.base import files, folders, recipes
from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import CURVES, JOURNAL
from fairway.base.specs import to_plain
from fairway.recipe import Recipe
from fairway.steps.products import RECIPE, SCORE

_SCORED = ("bits_per_byte", "code_length_bits", "tokens", "text_bytes", "text_sha256")


@dataclass(frozen=True)
class Finished:
    """A run that ended in a score. table: its resolved recipe; facts: the last of each name; outcome: score.json."""

    folder: Path
    recipe: Recipe
    table: dict[str, Any]
    facts: dict[str, dict[str, Any]]
    outcome: Any


def is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def is_finished(folder: Path) -> bool:
    """Whether a run ended: score.json is written last."""
    return is_run(folder) and (folder / SCORE).is_file()


def read_run(folder: Path) -> Finished:
    """A finished run, without its lock. RecipeError where its recipe cannot be, DataError where another file is not
    what it should be."""
    recipe = recipes.load(Recipe, folder / RECIPE)
    facts: dict[str, dict[str, Any]] = {}
    with whole(folder):
        for row in folders.rows(folder / JOURNAL):
            row.pop("time", None)
            facts[row.pop("fact", "")] = row
        outcome = json.loads(files.read(folder / SCORE))
    return Finished(folder, recipe, to_plain(recipe), facts, outcome)


@contextmanager
def whole(folder: Path) -> Iterator[None]:
    """What is read of a run inside: DataError where something is not there, or not of its kind."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{folder}: not the journal of a finished run ({told}); name one that is whole") from error


def own_score(run: Finished) -> None:
    """score.json against the journal: an edited one, or one of another artifact, is not the run's."""
    outcome, facts, result = run.outcome, run.facts, run.recipe.score.result
    scored = facts[f"score_{result}"]
    pairs = {key: (outcome[key], scored[key]) for key in _SCORED}
    pairs["result"] = (outcome["result"], result)
    pairs["artifact_sha256"] = (outcome["artifact_sha256"], facts["artifact"]["sha256"])
    for stage, value in outcome["stages"].items():
        if value is not None:
            pairs[f"stages.{stage}"] = (value, facts[f"score_{stage}"]["bits_per_byte"])
    for key, (told, booked) in pairs.items():
        if told != booked:
            remedy = "`fairway score` writes it again"
            raise RecipeError(f"{run.folder / SCORE}: {key} = {told!r}, but {booked!r} in the journal; {remedy}")


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


def curve_of(folder: Path) -> Iterator[tuple[int, float]]:
    """(step, loss) of a run's training."""
    for point in folders.rows(folder / CURVES):
        if point.get("curve") == "train":
            yield int(point["step"]), float(point["loss"])
