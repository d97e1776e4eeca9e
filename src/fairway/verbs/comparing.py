"""Approaches beside one another."""

import json as json_text
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fairway.base.errors import RecipeError
from fairway.lab import compare as lab
from fairway.lab.compare.same import RESULT
from fairway.lab.compare.tables import Sheet, remarks
from fairway.verbs.printing import printable

STAGES = (RESULT, "float", "quantized", "sliding", "adapted")


def compare(places: list[Path], baseline: str, stage: str, by: str, as_json: bool, as_markdown: bool) -> None:
    for option, value, choices in (("--stage", stage, STAGES), ("--by", by, ("steps", "clock"))):
        if value not in choices:
            raise RecipeError(f"{option} {value}: choices: {', '.join(choices)}")
    found = lab.compare(places, baseline, stage, by)
    if as_json:
        print(json_text.dumps(asdict(found), indent=2, allow_nan=False))
    elif as_markdown:
        print(lab.markdown(found), end="")
    else:
        show(found)


def show(found: lab.Comparison) -> None:
    """The tables, and what a reader must know of them."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    for sheet in lab.tables(found):
        console.print(_drawn(sheet))
        console.print()
    for line in remarks(found):
        print(printable(line))


def _drawn(sheet: Sheet) -> Table:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(sheet.head):
        drawn.add_column(name, justify="left" if number < sheet.words else "right", overflow="fold")
    for row in sheet.rows:
        drawn.add_row(*(printable(cell).replace("[", "\\[") for cell in row))
    return drawn
