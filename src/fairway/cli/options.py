"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Set = Annotated[list[str] | None, typer.Option("--set", help="Override one value: --set train.clip=1.0. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs, nothing else.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Runs = Annotated[Path, typer.Option("--runs", help="Where run folders lie.")]
Log = Annotated[str, typer.Option("--log", help="Book points and facts there, too: tensorboard or wandb (extras).")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, such as runs/latest.")]
ArtifactPath = Annotated[
    Path, typer.Option("-a", "--artifact", help="An artifact file, such as runs/latest/artifact.fw.")
]
Recipe = Annotated[str, typer.Argument(help="A recipe: a .toml file, or a name that `fairway list recipes` shows.")]
