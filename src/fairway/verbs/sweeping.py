"""Many recipes, many seeds, one command that can be called again: what is finished is never run twice."""

import json as json_text
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from fairway.base import files, recipes, slots, tables
from fairway.base.devices import choose
from fairway.base.errors import DataError, FairwayError, RecipeError
from fairway.base.specs import to_plain
from fairway.lab import logs
from fairway.lab.compare import compare
from fairway.lab.sweep import Approach, Book, approaches, finished, folder_name, plan, read_plan
from fairway.lab.sweep.book import read_facts
from fairway.lab.sweep.engines import Crew, crew, crew_elsewhere, gpus_here
from fairway.lab.sweep.expecting import Expectation, Runs
from fairway.lab.sweep.one import Ended, Job
from fairway.lab.sweep.showing import Progress, Screen, shown
from fairway.lab.sweep.trained import order, own_seconds, training_of
from fairway.recipe import Recipe
from fairway.steps import RECIPE
from fairway.verbs.comparing import show
from fairway.verbs.listing import parameters
from fairway.verbs.printing import table
from fairway.verbs.running import seeds_of


def sweep(
    sources: Sequence[str],
    seeds: str,
    form: str,
    overrides: tuple[str, ...],
    engine: str,
    jobs: int | None,
    device: str,
    runs: Path,
    out: Path | None,
    only_plan: bool,
    log: str,
    as_json: bool,
) -> None:
    """Plans the runs of some recipes and seeds, and makes those that are not finished."""
    where = slots.technique("fairway.lab.sweep.engines", engine, "--engine")
    if log:
        logs.check(log)
    chosen, wanted = approaches(sources, overrides, form), seeds_of(seeds)
    if where.elsewhere():
        target, hands = device, crew_elsewhere(jobs, len(chosen) * max(len(wanted), 1), device)
    else:
        target = choose(device).torch.type
        hands = crew(jobs, gpus_here() if target == "cuda" else ())
    folder = out or runs / folder_name(sources, form)
    if only_plan:
        _show_plan(folder, chosen, plan(chosen, wanted, read_plan(folder)), as_json)
        return
    with Book(folder) as book:
        planned = plan(chosen, wanted, book.planned)
        book.extend([one for one, _ in planned])
        failed = _make(book, planned, where, hands, target, log, as_json)
        _show_results(folder, planned, failed, as_json)
    if failed:
        names = ", ".join(f"{one.recipe} seed {one.seed}" for one, _ in planned if one.id in failed)
        raise FairwayError(f"sweep {folder}: {len(failed)} of {len(planned)} runs failed: {names}; why stands above")


def _make(
    book: Book, planned: Runs, where: ModuleType, hands: Crew, target: str, log: str, quiet: bool
) -> dict[str, str]:
    """Runs what is not finished; {id: why} of those that failed."""
    booked = {fact.get("id") for fact in book.facts if fact.get("fact") == "finished"}
    turns = [planned[place] for place in order([recipe for _, recipe in planned])]
    todo = [(one, recipe) for one, recipe in turns if finished(book.folder, one) is None]
    for one, _ in planned:
        score = finished(book.folder, one)
        if score is not None and one.id not in booked:  # it ended when nobody was left to book it
            book.fact(one.id, "finished", bits_per_byte=score["bits_per_byte"])
    expected = Expectation(book.folder, planned, book.facts, book.planned)
    progress = Progress(todo, book.folder, expected, hands.width)
    with shown(progress, quiet) as screen:
        if done := len(planned) - len(todo):
            screen.line(f"{done} of {len(planned)} runs are finished already")
        try:
            return _run(book, todo, where, hands, target, log, progress, screen)
        except KeyboardInterrupt:
            if not quiet:
                rest = len(todo) - len(progress.ended)
                print(f"{rest} runs are not finished; the same command goes on with them", file=sys.stderr)
            raise


def _run(
    book: Book, todo: Runs, where: ModuleType, hands: Crew, target: str, log: str, progress: Progress, screen: Screen
) -> dict[str, str]:
    failed, jobs = dict[str, str](), list[Job]()

    def end(ended: Ended) -> None:
        planned, _ = progress.runs[ended.id]
        score, training = finished(book.folder, planned), own_seconds(book.folder / planned.folder)
        if score is None:
            failed[ended.id] = ended.error or "ended without a score"
            book.fact(ended.id, "failed", error=failed[ended.id], seconds=ended.seconds)
            screen.line(progress.failed(ended))
        else:
            said = {"seconds": ended.seconds, "training_seconds": round(training, 1)}
            book.fact(ended.id, "finished", bits_per_byte=score["bits_per_byte"], **said)
            screen.line(progress.finished(ended, training, score["bits_per_byte"]))

    for one, recipe in todo:
        place = (book.folder / one.folder).resolve()
        if foreign := _prepared(place, recipe):
            end(Ended(one.id, 0.0, foreign))
        else:
            jobs.append(Job(one.id, place, target, hands.threads, Path.cwd(), training_of(recipe), log))
    with closing(where.run(jobs, hands)) as events:
        for event in events:
            if isinstance(event, Job):
                book.fact(event.id, "started")
                progress.started(event.id)
            elif isinstance(event, Ended):
                end(event)
            screen.look()
    return failed


def _prepared(folder: Path, recipe: Recipe) -> str:
    """Puts the resolved recipe into its run folder; why not, where another one is there."""
    path, resolved = folder / RECIPE, tables.dump(to_plain(recipe))
    if not path.exists():
        files.write(path, resolved)
    elif not _says(path, recipe):
        return (
            f"RecipeError: {path}: holds another recipe, or one from another version; remove the folder to start anew"
        )
    return ""


def _says(path: Path, recipe: Recipe) -> bool:
    """Whether a run folder's recipe is this one, whatever its summary says."""
    try:
        return replace(recipes.load(Recipe, path), summary=recipe.summary) == recipe
    except FairwayError:
        return False


def _show_plan(folder: Path, chosen: Sequence[Approach], planned: Runs, as_json: bool) -> None:
    expected = Expectation(folder, planned, read_facts(folder), read_plan(folder)).seconds()
    sizes = {approach.recipe.name: parameters(approach.recipe) for approach in chosen}
    rows = [
        {
            "id": one.id,
            "recipe": one.recipe,
            "seed": one.seed,
            "parent": one.parent,
            "baseline": one.baseline,
            "parameters": sizes[one.recipe],
            "expected_seconds": expected.get(one.id),
            "finished": finished(folder, one) is not None,
        }
        for one, _ in planned
    ]
    if as_json:
        print(json_text.dumps({"sweep": str(folder), "runs": rows}, indent=2))
        return
    shown = []
    for row in rows:
        seconds = row["expected_seconds"]
        time = "finished" if row["finished"] else "?" if seconds is None else f"about {seconds:.0f} s"
        remark = f"{row['id']}  {time}" + ("  baseline" if row["baseline"] else "")
        shown.append((f"{row['recipe']}, seed {row['seed']}", f"{row['parameters']:,}", remark))
    table("run", "parameters", shown)
    rest = sum(not row["finished"] for row in rows)
    print(f"{len(rows)} runs, {rest} of them to be made, in {folder}; nothing was run")


def _show_results(folder: Path, planned: Runs, failed: dict[str, str], as_json: bool) -> None:
    scores: dict[str, list[float]] = {one.recipe: [] for one, _ in planned}
    rows = []
    for one, _ in planned:
        score = finished(folder, one)
        row: dict[str, Any] = {"id": one.id, "recipe": one.recipe, "seed": one.seed, "run": str(folder / one.folder)}
        if score is not None:
            scores[one.recipe].append(score["bits_per_byte"])
            row["bits_per_byte"] = score["bits_per_byte"]
        rows.append(row | ({"error": failed[one.id]} if one.id in failed else {}))
    if as_json:
        print(json_text.dumps({"sweep": str(folder), "runs": rows}, indent=2))
        return
    shown = []
    for name, values in scores.items():
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        mean = f"{statistics.mean(values):.4f}{spread}" if values else "-"
        shown.append((name, mean, f"{len(values)} of {sum(one.recipe == name for one, _ in planned)} seeds"))
    table("recipe", "bits per byte", shown)
    if sum(map(bool, scores.values())) > 1:
        try:
            show(compare([folder], by="either"))
        except (RecipeError, DataError) as error:  # its runs cannot be held against one another: its own line says why
            print(f"compare: {error}")
    print(f"sweep folder {folder}")
