"""A sweep's folder: its plan, its book of facts, its lock.

plan.jsonl: one line for each run. sweep.jsonl: append-only facts, `started`, `finished` and `failed`, each with the
run's id. What is finished is asked of the run folders: a run that ended while nobody was left to book it counts.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

from fairway.base import files, folders
from fairway.base.errors import DataError, RecipeError
from fairway.lab.sweep.plan import Planned
from fairway.steps.products import SCORE

PLAN, FACTS = "plan.jsonl", "sweep.jsonl"


class Book:
    """The folder of a sweep, held by one process. RecipeError where another holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._lock = folders.locked(folder)
        except RecipeError as error:
            said = str(error).replace("run folder", "sweep folder", 1)
            raise RecipeError(said.replace("or start a new run", "or name another folder with --out")) from error
        try:
            self.planned = read_plan(folder)
            folders.end_torn_line(folder / FACTS)
            self.facts = list(folders.rows(folder / FACTS))
        except BaseException:
            self.close()
            raise

    def extend(self, planned: Sequence[Planned]) -> None:
        """Takes runs up into the plan; those that are in it stay as they are."""
        known = {one.id for one in self.planned}
        if new := [one for one in planned if one.id not in known]:
            self.planned += new
            files.write(self.folder / PLAN, "".join(json.dumps(asdict(one)) + "\n" for one in self.planned))

    def fact(self, id_: str, what: str, **values: Any) -> None:
        row = {"fact": what, "time": round(time.time(), 3), "id": id_, **values}
        self.facts.append(row)
        folders.append(self.folder / FACTS, row)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_plan(folder: Path) -> list[Planned]:
    """The runs of a sweep's folder, in the order of the plan; none where there is no plan yet.

    The plan is written whole or not at all, so a line that is none was not left by a kill: DataError.
    """
    path, found = folder / PLAN, []
    if not path.exists():
        return []
    for number, line in enumerate(files.read(path).splitlines(), 1):
        try:
            found.append(_planned(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{path}: line {number} is no run of a plan; delete the file: the same sweep plans the same runs "
                "again, and finds those that are finished"
            ) from None
    return found


def read_facts(folder: Path) -> list[dict[str, Any]]:
    """What was booked in a sweep's folder, for those who only look."""
    return list(folders.rows(folder / FACTS))


def finished(folder: Path, planned: Planned) -> dict[str, Any] | None:
    """The score.json of a run that has ended, else None. It is written last, and whole."""
    return score_of(folder / planned.folder, planned.recipe, planned.seed)


def score_of(folder: Path, recipe: str, seed: int) -> dict[str, Any] | None:
    """The score.json in a run folder, where it is that recipe's and that seed's."""
    try:
        score = json.loads((folder / SCORE).read_bytes())
    except (OSError, ValueError):
        return None
    return score if isinstance(score, dict) and (score.get("recipe"), score.get("seed")) == (recipe, seed) else None


def _planned(row: Any) -> Planned:
    """A line of the plan, every field there and of its kind."""
    kinds = {field.name: str(field.type) for field in fields(Planned)}
    if set(row) != set(kinds):
        raise ValueError
    one = Planned(**row)
    texts = (one.id, one.recipe, one.approach, one.sha256)
    if not all(isinstance(text, str) and text and "/" not in text for text in texts) or type(one.seed) is not int:
        raise ValueError
    return one
