"""How answers are printed: tables for people, JSON for programs."""

import json as json_text
import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def answer(facts: dict[str, Any], line: str, as_json: bool) -> None:
    """A verb's answer: facts for programs, or one line for people."""
    print(json_text.dumps(facts, indent=2) if as_json else line)


def table(what: str, value: str, table: list[tuple[str, str, str]]) -> None:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column(what)
    drawn.add_column(value, justify="right")
    drawn.add_column("")
    for row in table:
        drawn.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)


def printable(text: str) -> str:
    """Text from elsewhere as one line can show it: what a terminal would obey is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
