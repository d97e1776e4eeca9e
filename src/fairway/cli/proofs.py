"""Verbs that ask whether a score is honest."""

from pathlib import Path
from typing import Annotated

import typer

from fairway.cli.options import ArtifactPath, DeviceName, Json, RunFolder

app = typer.Typer()


@app.command()
def prove(
    folder: RunFolder,
    slice_: Annotated[
        str, typer.Option("--slice", help="How much text: 8KB, 64KB, 1MB. Default: as the recipe says.")
    ] = "",
    full: Annotated[bool, typer.Option("--full", help="All of the held-out text.")] = False,
    chunks: Annotated[int, typer.Option(min=0, help="Prove this many chunks of a score made in exact mode.")] = 0,
    nonce: Annotated[str, typer.Option(help="With --chunks: any text, chosen after the score was booked.")] = "",
    json: Json = False,
) -> None:
    """Writes held-out text as a real file and decodes it in another process: a score is a file that decodes."""
    from fairway.verbs import proving

    proving.prove(folder, slice_, full, chunks, nonce, json)


@app.command()
def probe(
    folder: RunFolder,
    flips: Annotated[int, typer.Option(min=1, help="How many single tokens are changed.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of the held-out text are probed.")] = 2048,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Changes tokens and watches: no distribution at or before the change may move."""
    from fairway.verbs import proving

    proving.probe(folder, flips, tokens, device, json)


@app.command()
def diagnose(
    folder: RunFolder,
    tokens: Annotated[int, typer.Option(min=64, help="How many tokens of the held-out text are read.")] = 4096,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """What dishonest scoring would claim on this run, and which instrument catches it: no score is among them."""
    from fairway.verbs import proving

    proving.diagnose(folder, tokens, device, json)


@app.command(hidden=True)
def decode_chunk(
    file: Path,
    artifact: ArtifactPath,
    state: Annotated[Path, typer.Option("--state")],
    before: Annotated[Path, typer.Option("--before")],
    out: Annotated[Path, typer.Option("-o", "--out")],
) -> None:
    """One chunk of an adapted text, from the state before it: what `prove --chunks` runs in another process."""
    from fairway.verbs import proving

    proving.decode_chunk(file, artifact, state, before, out)
