"""Slot: the order in which windows of training text are read. A loader is a `Spec` and `order(spec, tokens, context,
seed)`, whose `rows(tokens, first, count)` gives windows number first .. first+count-1 of the whole run, a pure function
of the seed and these numbers; `windows` is how many one pass over the text holds."""

from collections.abc import Iterator


def by_epoch(first: int, count: int, windows: int) -> Iterator[tuple[int, slice]]:
    """(epoch, which of its windows) for windows number first .. first+count-1 of the run; windows: in an epoch."""
    stop = first + count
    while first < stop:
        epoch, begin = divmod(first, windows)
        end = min(begin + stop - first, windows)
        yield epoch, slice(begin, end)
        first += end - begin
