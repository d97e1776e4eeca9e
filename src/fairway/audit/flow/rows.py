"""Whether a tensor has one row for all windows of a batch, or one for each."""

from __future__ import annotations

from fairway.audit.flow.values import Value


def _sizes(shape: list[Value]) -> list[Value]:
    """The sizes of zeros(8, 1, d) and of zeros((8, 1, d)) alike."""
    return list(shape[0].items) if len(shape) == 1 and shape[0].items is not None else shape


def rows_of(shape: list[Value], kwargs: dict[str, Value]) -> str:
    """Of a tensor that is made with this shape: "one" or "many"."""
    shape = _sizes(shape)
    if not shape and "size" in kwargs and kwargs["size"].items is not None:
        shape = list(kwargs["size"].items or ())
    if not shape:
        return "one"
    return "one" if len(shape) == 1 or shape[0].const == 1 else "many"


def broadcast(shape: list[Value]) -> bool:
    """zeros(1, 1, d): the one row is meant for many."""
    shape = _sizes(shape)
    return len(shape) > 1 and shape[0].const == 1


def spread(shape: list[Value]) -> bool:
    """expand(B, 1, d): one row, seen as one for each window. A copy of it has a row for each."""
    shape = _sizes(shape)
    return bool(shape) and shape[0].const not in (1, -1)


def over_rows(name: str, args: list[Value], kwargs: dict[str, Value]) -> bool:
    """delta.mean(dim=0): what was one row for each window is one for all."""
    along = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    return name in ("mean", "sum", "median", "nanmean") and along is not None and along.const == 0
