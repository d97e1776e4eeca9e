"""Verbs that show what is at hand."""

import typer

from fairway.cli.options import Json

app = typer.Typer()
listing = typer.Typer(help="Shows what is at hand.", no_args_is_help=True)
app.add_typer(listing, name="list")


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
