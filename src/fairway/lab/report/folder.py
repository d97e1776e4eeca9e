"""What a run folder says, read as it lies there: without its lock, finished or not, whatever is missing."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.base import files
from fairway.base.errors import DataError, RecipeError
from fairway.base.folders import rows
from fairway.base.journal import CURVES, JOURNAL
from fairway.lab.report.curves import Curve, number
from fairway.score.profile import Profile, read_profile
from fairway.steps.products import ARTIFACT, RECIPE, SCORE

STAGES = ("float", "quantized", "sliding", "adapted")


@dataclass(frozen=True)
class Folder:
    """One run. journal: every fact in order; facts: the last of each name; score: score.json, {} while there is none;
    missing: what could not be read, one sentence each."""

    path: Path
    recipe: dict[str, Any]
    journal: list[dict[str, Any]]
    facts: dict[str, dict[str, Any]]
    score: dict[str, Any]
    curve: Curve
    profile: Profile | None
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.get("run", "recipe") or self.path.name)

    @property
    def seed(self) -> str:
        seed = self.recipe.get("seed", self.get("run", "seed"))
        return "?" if seed is None else str(seed)

    @property
    def result(self) -> str:
        """The stage that is the score, named before the run."""
        chosen = self.recipe.get("score", {}).get("result") if isinstance(self.recipe.get("score"), dict) else None
        return str(self.score.get("result") or chosen or "")

    @property
    def stages(self) -> dict[str, float]:
        """Bits per byte of each stage that has been scored."""
        told = self.score.get("stages")
        told = told if isinstance(told, dict) else {}
        found = {stage: number(told.get(stage, self.get(f"score_{stage}", "bits_per_byte"))) for stage in STAGES}
        return {stage: value for stage, value in found.items() if value is not None}

    def get(self, fact: str, key: str) -> Any:
        """What the last fact of a name says under a key; None where there is none."""
        return self.facts.get(fact, {}).get(key)

    def figure(self, *keys: str) -> float | None:
        """A number: of the recipe by its path ("budget", "artifact_bytes"), None where it is none."""
        place: Any = self.recipe
        for key in keys:
            place = place.get(key) if isinstance(place, dict) else None
        return number(place)

    def size(self, name: str) -> int | None:
        """A file's bytes by stat(); None where it is missing."""
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return None


def is_run(folder: Path) -> bool:
    return (folder / JOURNAL).is_file() or (folder / RECIPE).is_file()


def open_folder(path: Path) -> Folder:
    """RecipeError where this is no run folder; whatever else is wrong with it is said in `missing`."""
    if not path.is_dir():
        raise RecipeError(f"{path}: no such folder; name a run folder, such as runs/latest")
    if not is_run(path):
        raise RecipeError(f"{path}: no run folder (neither {RECIPE} nor {JOURNAL} lies in it); name one under runs/")
    missing: list[str] = []
    recipe, score = _toml(path / RECIPE, missing), _json(path / SCORE, missing)
    journal = [row for row in rows(path / JOURNAL) if isinstance(row.get("fact"), str)]
    facts = {row["fact"]: row for row in journal}
    curve, profile = Curve(path / CURVES).read(), None
    try:
        profile = read_profile(path)
    except DataError as error:
        missing.append(str(error))
    return Folder(path, recipe, journal, facts, score, curve, profile, (*missing, *_gaps(facts, score, curve, profile)))


def _gaps(facts: dict[str, Any], score: dict[str, Any], curve: Curve, profile: Profile | None) -> Iterator[str]:
    """What a whole run has and this one has not (yet)."""
    if not facts:
        yield "The journal holds no fact: the run has not begun, or was killed at once."
    if not curve.stretches:
        yield "No point of the training curve."
    if curve.unfit:
        yield f"{curve.unfit:,} points of the training curve have a loss that is no finite number; they are left out."
    for fact, says in _STEPS.items():
        if facts and fact not in facts:
            yield f"{says} (the journal has no fact '{fact}')."
    if facts and not score:
        yield f"No {SCORE}: the run is unfinished."
    elif facts and profile is None:
        yield "No profile of the score (runs made before it was kept have none): nothing by document or along the text."


_STEPS = {
    "train": "Training has not ended",
    "calibration": "Hessians are not gathered",
    "quant": "Nothing is quantised",
    "artifact": f"No {ARTIFACT} is packed",
}


def recipe_table(folder: Path) -> dict[str, Any]:
    """The resolved recipe as it lies there, unchecked: of another version, perhaps; {} where it cannot be read."""
    return _toml(folder / RECIPE, [])


def _toml(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(files.read(path).decode())
    except (DataError, ValueError) as error:
        missing.append(str(error) if isinstance(error, DataError) else f"{path}: no TOML ({error})")
    return {}


def _json(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(files.read(path))
    except (DataError, ValueError, RecursionError) as error:
        missing.append(str(error) if isinstance(error, DataError) else f"{path}: no JSON ({error})")
        return {}
    if not isinstance(found, dict):
        missing.append(f"{path}: no table of figures")
        return {}
    return found
