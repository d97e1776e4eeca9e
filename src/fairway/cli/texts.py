"""Verbs for a person's own text."""

from typing import Annotated

import typer

from fairway.cli.options import ArtifactPath, DeviceName, Json

app = typer.Typer()


@app.command()
def compress(
    file: Annotated[str, typer.Argument(help="Any file; - for standard input.")],
    artifact: ArtifactPath,
    out: Annotated[str, typer.Option("-o", "--out", help="Where to write; - for standard output.")],
    adapt: Annotated[bool, typer.Option("--adapt", help="Learn from the text as it goes: smaller, slower.")] = False,
    lanes: Annotated[int, typer.Option(min=0, help="Parts that are read side by side; 0: by the file's size.")] = 0,
    json: Json = False,
) -> None:
    """Compresses any file with an artifact."""
    from fairway.verbs import texts

    texts.compress(file, artifact, out, adapt, lanes, json)


@app.command()
def decompress(
    file: Annotated[str, typer.Argument(help="A file that `fairway compress` wrote; - for standard input.")],
    artifact: ArtifactPath,
    out: Annotated[str, typer.Option("-o", "--out", help="Where to write; - for standard output.")],
    json: Json = False,
) -> None:
    """Gives back exactly the bytes that were compressed, or an error and nothing."""
    from fairway.verbs import texts

    texts.decompress(file, artifact, out, json)


@app.command()
def sample(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    seed: int = 1337,
    device: DeviceName = "cpu",
    json: Json = False,
) -> None:
    """Lets an artifact write."""
    from fairway.verbs import texts

    texts.sample(artifact, prompt, tokens, temperature, seed, device, json)
