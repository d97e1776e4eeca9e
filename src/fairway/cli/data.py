"""Verbs for data at full size."""

from pathlib import Path
from typing import Annotated

import typer

from fairway.cli.options import Json

app = typer.Typer()
data = typer.Typer(help="Data at full size: text to token shards, tokenizers.", no_args_is_help=True)
tokenizer = typer.Typer(help="Tokenizers: trained on training text, compared.", no_args_is_help=True)
data.add_typer(tokenizer, name="tokenizer")
app.add_typer(data, name="data")

Sources = Annotated[list[str], typer.Argument(help="Files or folders, packed or plain; - for standard input.")]


@data.command()
def build(
    sources: Sources,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of the shards.")],
    model: Annotated[Path, typer.Option("--tokenizer", help="A SentencePiece .model file.")],
    json: Json = False,
) -> None:
    """Any text -> token shards in the challenge's format, document offsets and byte counts, a manifest."""
    from fairway.verbs import building

    building.build(sources, out, model, json)
