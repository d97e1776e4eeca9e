"""The verb for other people's scores."""

from pathlib import Path
from typing import Annotated

import typer

from fairway.cli.options import Json

app = typer.Typer()


@app.command()
def audit(
    path: Annotated[Path, typer.Argument(help="A script, a record folder, or a folder of these.")] = Path("."),
    json: Json = False,
    strict: Annotated[bool, typer.Option("--strict", help="Accepted departures count as violations.")] = False,
    comment: Annotated[bool, typer.Option("--comment", help="Print one review ready to paste (Markdown).")] = False,
    second_opinion: Annotated[
        Path | None,
        typer.Option(
            "--second-opinion", help="Another reviewer's verdicts (JSON, or `rule: verdict` lines) to compare."
        ),
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", help="Write one self-contained HTML page here.")] = None,
    dynamic: Annotated[
        str,
        typer.Option("--dynamic", help="MODULE:OBJECT at PATH that offers the Predictor interface: runs it, sealed."),
    ] = "",
    text: Annotated[
        Path | None,
        typer.Option("--text", help="With --dynamic: the held-out text (default: a small text of our own)."),
    ] = None,
) -> None:
    """Reads somebody else's submission, without executing it, and says what breaks which rule where. Exit code 1 on a
    violation."""
    from fairway.verbs import auditing

    if dynamic:
        honest = auditing.dynamic(path, dynamic, text, json)
    else:
        honest = auditing.audit(path, strict, comment, second_opinion, page, json)
    if not honest:
        raise typer.Exit(1)
