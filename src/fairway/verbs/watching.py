"""A run, or all runs of a sweep, watched in the terminal."""

import json as json_text
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fairway.base.errors import RecipeError
from fairway.lab.report.folder import is_run
from fairway.lab.sweep.book import PLAN, read_plan
from fairway.lab.watching import View, Watch, frame, line


def watch(folder: Path, once: bool, every: float, as_json: bool) -> None:
    """Shows a run folder until its run has ended, or once; a sweep's folder with one line for each run."""
    watches = _watches(folder)
    if as_json:
        views = [asdict(one.look()) for one in watches]
        print(json_text.dumps(views if (folder / PLAN).exists() else views[0], indent=2))
        return
    console = Console()
    if once or not console.is_terminal:
        drawn, _ = _frame(watches, console.width)
        console.print(drawn, highlight=False)
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                drawn, finished = _frame(watches, console.width)
                live.update(drawn, refresh=True)
                if finished:
                    return
                time.sleep(every)
    except KeyboardInterrupt:  # the watching ends; the run goes on
        return


def _watches(folder: Path) -> list[Watch]:
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; name a run folder, such as runs/latest, or a sweep's")
    if (folder / PLAN).exists():
        return [Watch(folder / planned.folder) for planned in read_plan(folder)]
    if not is_run(folder):
        raise RecipeError(f"{folder}: no run folder and no sweep's folder; name one under runs/")
    return [Watch(folder)]


def _frame(watches: list[Watch], width: int) -> tuple[RenderableType, bool]:
    """What is shown, and whether there is nothing more to come."""
    views = [one.look() for one in watches]
    finished = all(view.finished for view in views)
    if len(watches) == 1:
        return Text(frame(views[0], watches[0].curve, width)), finished
    return _table(views), finished


def _table(views: list[View]) -> Table:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "stage", "training", "score or loss"):
        drawn.add_column(heading, justify="right" if heading == "score or loss" else "left")
    for view in views:
        drawn.add_row(*map(Text, line(view)))
    done = sum(view.finished for view in views)
    drawn.caption = f"{done} of {len(views)} runs have ended"
    return drawn
