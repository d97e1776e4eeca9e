"""The verb that says which of several approaches is better, and how sure that is."""

from pathlib import Path
from typing import Annotated

import typer

from fairway.cli.options import Json

app = typer.Typer()


@app.command()
def compare(
    places: Annotated[list[Path], typer.Argument(help="Run folders, a sweep's folder, or folders of runs.")],
    baseline: Annotated[
        str, typer.Option(help="The approach that the others are held against; default: b6, or the first.")
    ] = "",
    stage: Annotated[
        str, typer.Option(help="float, quantized, sliding or adapted; default: each run's result.")
    ] = "result",
    by: Annotated[str, typer.Option(help="What the runs share: steps, or clock.")] = "steps",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print one table for a README or a log.")] = False,
    json: Json = False,
) -> None:
    """Means, intervals and tests of several approaches against one, cost beside gain."""
    from fairway.verbs import comparing

    comparing.compare(places, baseline, stage, by, json, markdown)
