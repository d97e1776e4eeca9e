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
Separator = Annotated[
    str, typer.Option(help="What opens a document of text, such as '<doc '. Default: a file is a document.")
]
TextKey = Annotated[str, typer.Option("--text-key", help="The text's key in JSON lines, or its column in Parquet.")]
ValidDocuments = Annotated[
    int | None, typer.Option("--valid-documents", help="Hold out the first so many documents (the challenge's: 50000).")
]
ValidFraction = Annotated[
    float, typer.Option("--valid-fraction", help="Else hold out this share, chosen by a hash of each document.")
]
Longest = Annotated[int, typer.Option(help="Bytes of a document that is still taken into memory.")]


@data.command()
def build(
    sources: Sources,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of the shards. Called again, a build goes on.")],
    model: Annotated[Path, typer.Option("--tokenizer", help="A SentencePiece .model file.")],
    format_: Annotated[
        str, typer.Option("--format", help="auto (by each file's suffix), text, jsonl or parquet.")
    ] = "auto",
    separator: Separator = "",
    text_key: TextKey = "text",
    valid_documents: ValidDocuments = None,
    valid_fraction: ValidFraction = 0.01,
    repeated: Annotated[
        str, typer.Option(help="Training documents that are held out too: leave_out or keep. Counted in any case.")
    ] = "leave_out",
    shard_tokens: Annotated[int, typer.Option(help="Tokens of each shard but the last.")] = 100_000_000,
    part: Annotated[
        str, typer.Option(help="2/8: the second of eight hosts' shares; then `fairway data join`.")
    ] = "1/1",
    workers: Annotated[int, typer.Option(min=0, help="Processes that encode; 0: one for each core.")] = 0,
    invalid: Annotated[str, typer.Option(help="Bytes that are no UTF-8: refuse, or replace (by U+FFFD; counted).")] = (
        "refuse"
    ),
    lossy: Annotated[
        str, typer.Option(help="Documents that the tokenizer cannot return: refuse or report.")
    ] = "refuse",
    longest: Longest = 16_777_216,
    json: Json = False,
) -> None:
    """Any text -> token shards in the challenge's format, document offsets and byte counts, a manifest."""
    from fairway.verbs import building

    building.build(
        sources,
        out,
        model,
        part,
        workers,
        json,
        kind=format_,
        separator=separator,
        text_key=text_key,
        valid_documents=valid_documents,
        valid_fraction=valid_fraction,
        repeated=repeated,
        shard_tokens=shard_tokens,
        invalid=invalid,
        lossy=lossy,
        longest=longest,
    )


@data.command()
def join(
    parts: Annotated[list[Path], typer.Argument(help="The folders of all parts of one build, in any order.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of the shards.")],
    json: Json = False,
) -> None:
    """The parts that several hosts built (--part) -> the very shards that one host would have built."""
    from fairway.verbs import building

    building.join(parts, out, json)


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


@data.command()
def inspect(
    place: Annotated[Path, typer.Argument(help="A folder of token shards, or one shard.")],
    model: Annotated[
        Path | None, typer.Option("--tokenizer", help="Their .model file. Default: the one beside them.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="How many documents' beginnings are shown.")] = 3,
    json: Json = False,
) -> None:
    """What token shards hold: documents, tokens, bytes, lengths, samples, and the tokenizer's sha256."""
    from fairway.verbs import inspecting

    inspecting.inspect(place, model, samples, json)


@data.command()
def stats(
    folder: Annotated[Path, typer.Argument(help="A folder of the challenge's shards, with their tokenizer.")],
    model: Annotated[Path | None, typer.Option("--tokenizer", help="The .model file, where it lies elsewhere.")] = None,
    json: Json = False,
) -> None:
    """The published facts of the challenge, and whether a folder agrees: a verdict for each; exit code 1 if not."""
    from fairway.verbs import inspecting

    inspecting.stats(folder, model, json)


@data.command()
def overlap(
    train: Annotated[list[str], typer.Argument(help="Training text (files, folders), or a folder of token shards.")],
    held_out: Annotated[str, typer.Argument(metavar="VALID", help="Held-out text, or shards of the same tokenizer.")],
    kind: Annotated[str, typer.Option("--format", help="auto (by the file's name), text, jsonl or parquet.")] = "auto",
    separator: Annotated[str, typer.Option(help="What opens a document of text. Default: a file is a document.")] = "",
    text_key: Annotated[str, typer.Option(help="The key of JSON lines, or the column of Parquet.")] = "text",
    near: Annotated[
        float, typer.Option(help="How alike near duplicates are at least: Jaccard's index, 0.3 to 1.")
    ] = 0.8,
    model: Annotated[Path | None, typer.Option("--tokenizer", help="Of the shards. Default: the one beside.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="How many examples of each kind are shown.")] = 5,
    workers: Annotated[int, typer.Option(min=0, help="Processes. Default: one for each core.")] = 0,
    json: Json = False,
) -> None:
    """Documents that stand in training and held-out data alike: exactly, or nearly."""
    from fairway.verbs import overlapping

    overlapping.overlap(train, held_out, kind, separator, text_key, near, model, examples, workers, json)


@tokenizer.command("train")
def train_tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .model file to write.")],
    vocab: Annotated[int, typer.Option(help="Pieces: 256 to 65,536, as many as 16 bits can tell apart.")] = 1024,
    sample: Annotated[
        int, typer.Option(min=1, help="Bytes of training text to learn from, evenly spread.")
    ] = 8_000_000,
    coverage: Annotated[float, typer.Option(help="Share of the characters that may have pieces.")] = 0.99,
    across_words: Annotated[bool, typer.Option(help="Pieces may hold a space inside.")] = True,
    transform: Annotated[str, typer.Option(help="none, or case: small letters behind operators of no bytes.")] = "none",
    format_: Annotated[
        str, typer.Option("--format", help="auto (by each file's suffix), text, jsonl or parquet.")
    ] = "auto",
    separator: Separator = "",
    text_key: TextKey = "text",
    valid_documents: ValidDocuments = None,
    valid_fraction: ValidFraction = 0.01,
    longest: Longest = 16_777_216,
    json: Json = False,
) -> None:
    """A tokenizer learned from training documents: what `data build` holds out by the same options is left out."""
    from fairway.verbs import building

    building.train_tokenizer(
        sources,
        out,
        {
            "vocab": vocab,
            "sample_bytes": sample,
            "coverage": coverage,
            "across_words": across_words,
            "transform": transform,
        },
        json,
        kind=format_,
        separator=separator,
        text_key=text_key,
        valid_documents=valid_documents,
        valid_fraction=valid_fraction,
        longest=longest,
    )


@tokenizer.command("compare")
def compare_tokenizers(
    models: Annotated[list[Path], typer.Argument(help="SentencePiece .model files.")],
    text: Annotated[Path, typer.Option("--text", help="A file of text, packed or plain; JSON lines and Parquet too.")],
    separator: Separator = "",
    most_bytes: Annotated[int, typer.Option("--bytes", min=1, help="How much of its beginning is taken.")] = 4_000_000,
    json: Json = False,
) -> None:
    """Bytes per token, tokens per word, speed, losses, and bits per byte of a small model, side by side."""
    from fairway.verbs import building

    building.compare_tokenizers(models, text, separator, most_bytes, json)
