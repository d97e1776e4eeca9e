"""Verbs -> functions; no logic. Heavy imports wait until a verb runs, so that --help answers at once."""

import signal
from collections.abc import Callable
from typing import Any

import typer

from fairway.base.errors import one_line_errors
from fairway.base.memory import keep_freed
from fairway.cli import audit, comparing, data, listing, proofs, reports, runs, sweeps, texts

app = typer.Typer(
    help="Trains the best language model that fits a byte budget, and scores it as the size of a file that decodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verbs in (runs, sweeps, comparing, reports, proofs, audit, data, texts, listing):
    app.add_typer(verbs.app)


def main(arguments: list[str] | None = None) -> Any:
    """The command line. Exit codes: 0 done, 2 wrong usage or RecipeError, 1 other errors."""
    call: Callable[..., Any] = app
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is a Ctrl-C: it writes a checkpoint
    keep_freed()
    with one_line_errors():
        return call(arguments)
