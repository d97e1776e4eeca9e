"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

from fairway.base.errors import RecipeError

Set = Annotated[list[str] | None, typer.Option("--set", help="Override one value: --set train.clip=1.0. Repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document for programs, nothing else.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Runs = Annotated[Path, typer.Option("--runs", help="Where run folders lie.")]
Pocket = Annotated[bool, typer.Option("--pocket", help="What it changes, on pocket_b6 in the place of b6.")]
Wiki = Annotated[bool, typer.Option("--wiki", help="The same on wiki's text and shape: larger, slower.")]
Log = Annotated[str, typer.Option("--log", help="Book points and facts there, too: tensorboard or wandb (extras).")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, such as runs/latest.")]
ArtifactPath = Annotated[
    Path, typer.Option("-a", "--artifact", help="An artifact file, such as runs/latest/artifact.fw.")
]
Recipe = Annotated[str, typer.Argument(help="A recipe: a .toml file, or a name that `fairway list recipes` shows.")]


def small_form(pocket: bool, wiki: bool) -> str:
    """ "pocket", "wiki" or "": which of its small forms a recipe is to be taken in."""
    if pocket and wiki:
        raise RecipeError("--pocket --wiki: one small form at a time; leave one out")
    return "pocket" if pocket else "wiki" if wiki else ""
