"""The six families of errors. A message is one line: place, value, remedy."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class FairwayError(Exception):
    """Root of all errors that a person can act on; the command line prints them in one line.

    What a message quotes (names of files, keys of a forged header) may hold line ends and worse: they are escaped.
    """

    exit_code = 1

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


class RecipeError(FairwayError):
    """You asked wrongly: a key, a type, a shape, an argument."""

    exit_code = 2


class DataError(FairwayError):
    """The text is not what it claims to be."""


class ContractError(FairwayError):
    """A technique broke the promise of its slot."""


class ArtifactError(FairwayError):
    """The file is damaged, cut short or foreign."""


class BudgetError(FairwayError):
    """A measured value is over its limit."""


class HonestyError(FairwayError):
    """The score would be false. Never caught, but by `diagnose`, which measures what is refused."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that a person can act on: one line on standard error, and the family's exit code."""
    try:
        yield
    except FairwayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(1) from None
