"""Verbs that make runs, fit them, weigh them and hand them in."""

from pathlib import Path
from typing import Annotated

import typer

from fairway.cli.options import DeviceName, Json, Log, Pocket, Recipe, RunFolder, Runs, Set, Wiki, small_form

app = typer.Typer()


@app.command()
def run(
    recipe: Annotated[str | None, typer.Argument(help="A recipe: a .toml file, or a name.")] = None,
    set_: Set = None,
    seeds: Annotated[str, typer.Option(help="Several runs, one for each seed: 1337,42,2025.")] = "",
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    pocket: Pocket = False,
    wiki: Wiki = False,
    device: DeviceName = "auto",
    runs: Runs = Path("runs"),
    log: Log = "",
    json: Json = False,
) -> None:
    """The whole way: text, tokenizer, training, quantising, one artifact, its score."""
    from fairway.verbs import running

    running.run(recipe, tuple(set_ or ()), seeds, resume, small_form(pocket, wiki), device, runs, json, log)


@app.command()
def train(
    recipe: Recipe,
    set_: Set = None,
    device: DeviceName = "auto",
    runs: Runs = Path("runs"),
    log: Log = "",
    json: Json = False,
) -> None:
    """Trains a recipe's model and gathers its Hessians, in a new run folder."""
    from fairway.verbs import running

    running.train(recipe, tuple(set_ or ()), device, runs, json, log)


@app.command()
def quantize(folder: RunFolder, device: DeviceName = "auto", json: Json = False) -> None:
    """Turns a run's trained weights into integers."""
    from fairway.verbs import running

    running.quantize(folder, device, json)


@app.command()
def pack(
    folder: RunFolder,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show every coder on the run's integers instead; writes nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Packs a run's integers into one artifact and weighs it."""
    from fairway.verbs import fitting, running

    if compare:
        fitting.compare(folder, json)
    else:
        running.pack(folder, json)


@app.command()
def fit(
    folder: RunFolder,
    budget: Annotated[int, typer.Option(min=1, help="Bytes that the artifact may have: 16000000.")],
    set_: Set = None,
    code: Annotated[bool, typer.Option("--code", help="The exported script is to fit in as well.")] = False,
    text: Annotated[
        int,
        typer.Option(min=0, help="Score so many tokens of training text, too; 0: none is read."),
    ] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A folder; default: RUN/fit-BUDGET.")] = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Finds the grids of least damage whose file lands just below a budget."""
    from fairway.verbs import fitting

    fitting.fit(folder, budget, tuple(set_ or ()), code, text, out, device, json)


@app.command()
def weigh(folder: RunFolder, json: Json = False) -> None:
    """What a run weighs: exported script + artifact, and all that a decoder needs."""
    from fairway.verbs import submitting

    submitting.weigh(folder, json)


@app.command()
def submit(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Finished runs of one recipe, one for each seed.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Make a record in this folder.")] = None,
    update: Annotated[Path | None, typer.Option(help="Take new runs up into this record.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="Make this record's scripts again from its commit, and run them alone.")
    ] = None,
    replaces: Annotated[Path | None, typer.Option(help="Say what changed since this run.")] = None,
    bar: Annotated[float | None, typer.Option(help="Bits per byte that a record must beat.")] = None,
    author: Annotated[str, typer.Option(help="For submission.json.")] = "",
    github: Annotated[str, typer.Option(help="For submission.json: the account.")] = "",
    runs: Annotated[Path, typer.Option("--runs", help="With --check: where the run folders lie.")] = Path("runs"),
    device: Annotated[str, typer.Option("--device", help="With --check: auto, cpu or cuda.")] = "auto",
    json: Json = False,
) -> None:
    """Hands runs in: a record folder with scripts, README, logs and hashes; or its check."""
    from fairway.verbs import submitting

    submitting.submit(folders or [], out, update, check, replaces, bar, author, github, runs, device, json)


@app.command()
def score(
    target: Annotated[Path, typer.Argument(help="A text file with -a; else a run folder, to score its artifact.")],
    artifact: Annotated[
        Path | None, typer.Option("-a", "--artifact", help="The artifact that scores the text.")
    ] = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Bits per byte: of any text with an artifact, or of a run's held-out text."""
    from fairway.verbs import running

    running.score(target, artifact, device, json)
