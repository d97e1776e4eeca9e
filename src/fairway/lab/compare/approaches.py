"""Runs -> approaches: what is gathered from folders and sweeps, and which runs are seeds of one and the same recipe."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.base.errors import DataError, RecipeError
from fairway.lab.finished import Finished, flat, is_finished, is_run, own_score, read_run, whole
from fairway.lab.sweep.book import PLAN, read_plan
from fairway.lab.sweep.plan import ONES_OWN
from fairway.steps.products import SCORE


@dataclass(frozen=True)
class LeftOut:
    """A run that is not compared, and why."""

    run: str
    why: str


@dataclass(frozen=True)
class Approach:
    """The runs of one recipe, one for each seed, in the order of their seeds. label: its name, with what differs where
    another recipe has the same; baseline: a sweep's plan calls it one."""

    label: str
    runs: tuple[Finished, ...]
    baseline: bool = False

    @property
    def seeds(self) -> list[int]:
        return [run.recipe.seed for run in self.runs]


def gather(places: Sequence[Path]) -> tuple[list[Finished], list[LeftOut], set[str]]:
    """(finished runs in the order named, what is left out, the names of a plan's baselines) of run folders, sweeps and
    folders of runs. RecipeError where a place is none of these or nothing is finished; DataError where a finished run
    cannot be read, RecipeError where its score is not the one that it booked."""
    found: dict[Path, Finished] = {}
    left: dict[Path, LeftOut] = {}
    baselines = set[str]()
    for place in places:
        folders, planned = _runs_in(place)
        baselines |= planned
        for folder in folders:
            home = folder.resolve()  # `latest` is another name of a run
            if home in found or home in left:
                continue
            if not is_finished(folder):
                left[home] = LeftOut(str(folder), f"not finished (no {SCORE})" if is_run(folder) else "not begun")
                continue
            found[home] = read_run(folder)
            with whole(folder):
                own_score(found[home])
    if not found:
        told = f"{len(left)} runs, none of them finished" if left else "no runs"
        raise RecipeError(f"{', '.join(map(str, places))}: {told}; name finished run folders, or a sweep")
    return list(found.values()), list(left.values()), baselines


def approaches(runs: Iterable[Finished], baselines: Iterable[str] = ()) -> tuple[list[Approach], list[LeftOut]]:
    """Runs by recipe, seeds and what hangs on them aside; of one seed that ran twice the newer run, the older is left
    out."""
    groups: dict[str, dict[int, Finished]] = {}
    left = list[LeftOut]()
    for run in runs:
        group = groups.setdefault(repr(sorted(shared(run).items())), {})
        other = group.get(run.recipe.seed)
        if other is not None:
            older, run = sorted((other, run), key=_ended)
            left.append(LeftOut(str(older.folder), f"seed {run.recipe.seed} again; {run.folder} is newer"))
        group[run.recipe.seed] = run
    tables = [shared(next(iter(group.values()))) for group in groups.values()]
    ordered = [tuple(group[seed] for seed in sorted(group)) for group in groups.values()]
    planned = set(baselines)
    found = [
        Approach(label, group, group[0].recipe.name in planned)
        for label, group in zip(_labels(tables), ordered, strict=True)
    ]
    return found, left


def shared(run: Finished) -> dict[str, Any]:
    """What all seeds of a run's recipe share: {dotted place: value}."""
    return {key: value for key, value in flat(run.table) if key not in ONES_OWN}


def _runs_in(place: Path) -> tuple[list[Path], set[str]]:
    """(the run folders of a place, the baselines of its plan)."""
    if is_run(place):
        return [place], set()
    if not place.is_dir():
        raise RecipeError(f"{place}: no such folder; name run folders, a sweep's folder, or a folder of runs")
    if (place / PLAN).exists():
        planned = read_plan(place)
        return [place / one.folder for one in planned], {one.recipe for one in planned if one.baseline}
    inside = sorted(path for path in place.iterdir() if is_run(path))
    if not inside:
        raise RecipeError(f"{place}: no run folder, and none in it; name run folders, a sweep, or a folder of runs")
    return inside, set()


def _labels(tables: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each approach: the recipe's, with up to three values that tell it from others of that name."""
    labels = []
    for number, table in enumerate(tables):
        namesakes = [other for other in tables if other["name"] == table["name"] and other is not table]
        keys = [key for key in table if any(other.get(key) != table[key] for other in namesakes)]
        told = ", ".join(f"{key}={table[key]}" for key in keys[:3])
        more = f", and {len(keys) - 3} more" if len(keys) > 3 else ""
        label = f"{table['name']} ({told or 'the other keys are missing'}{more})" if namesakes else str(table["name"])
        labels.append(f"{label} #{number + 1}" if label in labels else label)
    return labels


def _ended(run: Finished) -> float:
    try:
        return (run.folder / SCORE).stat().st_mtime
    except OSError as error:
        raise DataError(f"{run.folder / SCORE}: {error.strerror}; name a finished run") from error
