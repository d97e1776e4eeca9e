"""Verbs -> functions; no logic. Heavy imports wait until a verb runs, so that --help answers at once."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fairway.base.errors import one_line_errors

app = typer.Typer(
    help="Trains the best language model that fits a byte budget, and scores it as the size of a file that decodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
listing = typer.Typer(help="Shows what is at hand.", no_args_is_help=True)
app.add_typer(listing, name="list")

Set = Annotated[list[str] | None, typer.Option("--set", help="Override one value: --set train.clip=1.0. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs, nothing else.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Runs = Annotated[Path, typer.Option("--runs", help="Where run folders lie.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, such as runs/latest.")]
ArtifactPath = Annotated[
    Path, typer.Option("-a", "--artifact", help="An artifact file, such as runs/latest/artifact.fw.")
]
Recipe = Annotated[str, typer.Argument(help="A recipe: a .toml file, or a name that `fairway list recipes` shows.")]


@app.command()
def run(
    recipe: Annotated[str | None, typer.Argument(help="A recipe: a .toml file, or a name.")] = None,
    set_: Set = None,
    seeds: Annotated[str, typer.Option(help="Several runs, one for each seed: 1337,42,2025.")] = "",
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    device: DeviceName = "auto",
    runs: Runs = Path("runs"),
    json: Json = False,
) -> None:
    """The whole way: text, tokenizer, training, quantising, one artifact, its score."""
    from fairway.verbs import running

    running.run(recipe, tuple(set_ or ()), seeds, resume, device, runs, json)


@app.command()
def train(
    recipe: Recipe, set_: Set = None, device: DeviceName = "auto", runs: Runs = Path("runs"), json: Json = False
) -> None:
    """Trains a recipe's model and gathers its Hessians, in a new run folder."""
    from fairway.verbs import running

    running.train(recipe, tuple(set_ or ()), device, runs, json)


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
    check: Annotated[Path | None, typer.Option(help="Make this record's scripts again, and run them alone.")] = None,
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


@app.command()
def doctor(json: Json = False) -> None:
    """What this machine can do, and what is missing."""
    from fairway.verbs import listing

    listing.doctor(json)


@listing.command("recipes")
def list_recipes(json: Json = False) -> None:
    """The recipes beside the package: parameters, budget, summary."""
    from fairway.verbs import listing

    listing.list_recipes(json)


@listing.command("techniques")
def list_techniques(json: Json = False) -> None:
    """The techniques of every slot."""
    from fairway.verbs import listing

    listing.list_techniques(json)


def main(arguments: list[str] | None = None) -> Any:
    """The command line. Exit codes: 0 done, 2 wrong usage or RecipeError, 1 other errors."""
    call: Callable[..., Any] = app
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is a Ctrl-C: it writes a checkpoint
    with one_line_errors():
        return call(arguments)
