"""Verbs for data at full size."""

from pathlib import Path
from typing import Annotated

import typer

from fairway.cli.options import Json

app = typer.Typer()
data = typer.Typer(help="Data at full size: shards fetched, built and examined, tokenizers.", no_args_is_help=True)
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


@data.command()
def fetch(
    name: Annotated[str, typer.Argument(help="fineweb (the challenge's), or a .toml file that describes a data set.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="Whose shards: sp1024, or another published name.")],
    shards: Annotated[int, typer.Option("--shards", min=0, help="How many training shards, of 100 million tokens.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The folder of the files. Default: data/NAME_TOKENIZER.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A local folder laid out like the repository, and no network.")
    ] = None,
    repository: Annotated[str, typer.Option(help="Another repository of the hub, as owner/name.")] = "",
    revision: Annotated[str, typer.Option(help="Another branch, tag or commit.")] = "",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="How many files at a time.")] = 4,
    json: Json = False,
) -> None:
    """Published token shards and their tokenizer, from the hub or a mirror: checked, taken up again where cut off."""
    from fairway.verbs import fetching

    fetching.fetch_data(name, tokenizer, shards, out, source, repository, revision, jobs, json)
