"""Verbs over many runs."""

from pathlib import Path
from typing import Annotated

import typer

from fairway.cli.options import DeviceName, Json, Log, Pocket, Runs, Set, Wiki, small_form

app = typer.Typer()


@app.command()
def sweep(
    sources: Annotated[list[str], typer.Argument(help="A folder of recipes, or recipes: .toml files or names.")],
    seeds: Annotated[str, typer.Option(help="1337,42,2025; default: each recipe's own.")] = "",
    pocket: Pocket = False,
    wiki: Wiki = False,
    set_: Set = None,
    engine: Annotated[str, typer.Option(help="Where runs go: local, ray or slurm.")] = "local",
    jobs: Annotated[int | None, typer.Option(help="Runs at a time; default: one for each GPU or core.")] = None,
    device: DeviceName = "auto",
    runs: Runs = Path("runs"),
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The sweep's folder; default: RUNS/sweep-NAME.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show the runs, and run nothing.")] = False,
    log: Log = "",
    json: Json = False,
) -> None:
    """Every recipe with every seed. Called again it goes on where it was, and repeats nothing that is finished."""
    from fairway.verbs import sweeping

    sweeping.sweep(
        sources, seeds, small_form(pocket, wiki), tuple(set_ or ()), engine, jobs, device, runs, out, plan, log, json
    )
