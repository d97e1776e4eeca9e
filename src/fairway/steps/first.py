"""Work that the first rank does for all of them."""

from collections.abc import Callable

from fairway.base.errors import BudgetError, FairwayError
from fairway.base.journal import Run


def by_the_first(run: Run, work: Callable[[], None]) -> None:
    """Does `work` on the first rank, while the others wait. Where it fails, all ranks end with its message."""
    error = ""
    if run.ranks.first:
        try:
            work()
        except FairwayError as caught:
            if run.ranks.world == 1:
                raise
            error = str(caught)
    error = run.ranks.share_text(error)
    if error:
        raise BudgetError(error)
