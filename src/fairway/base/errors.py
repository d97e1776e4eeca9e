"""The six families of errors. A message is one line: place, value, remedy."""


class FairwayError(Exception):
    """Root of all errors that a person can act on; the command line prints them in one line."""

    exit_code = 1


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
