"""Verbs that show runs: as a page, and in the terminal while they go on."""

from pathlib import Path
from typing import Annotated

import typer

from fairway.cli.options import Json

app = typer.Typer()
Folder = Annotated[Path, typer.Argument(help="A run folder, such as runs/latest, or a sweep's folder.")]


@app.command()
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The page; default: FOLDER/report.html.")] = None,
    json: Json = False,
) -> None:
    """One self-contained page of a run or a sweep: curves, scores, bytes, budgets, journal."""
    from fairway.verbs import reporting

    reporting.report(folder, out, json)


@app.command()
def watch(
    folder: Folder,
    once: Annotated[bool, typer.Option("--once", help="Show it once, as it is now.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    json: Json = False,
) -> None:
    """A running run's loss, rate, time left and budgets, until it ends; Ctrl-C ends the watching alone."""
    from fairway.verbs import watching

    watching.watch(folder, once, every, json)
