"""Documents in the order of their lengths: places in the data that a sort has put there, and what they cut out."""

from __future__ import annotations

from dataclasses import replace

from fairway.audit.flow.values import LENGTH, ORDERED, Value


def by_length(key: Value, element: Value | None = None) -> bool:
    """Whether what is sorted by is a length: a place less another, or the length of tokens."""
    first = key.items[0] if key.items else key
    if not first.flags & LENGTH or first.losses:
        return False
    return bool(first.less) or (element is not None and element.raw)


def in_order(value: Value) -> Value:
    """The same, as it stands in such an order."""
    items = tuple(in_order(item) for item in value.items) if value.items is not None else None
    toks = frozenset(replace(tok, ordered=True) for tok in value.toks) if value.raw else value.toks
    return value.but(items=items, toks=toks, env=value.env | ORDERED)


__all__ = ["by_length", "in_order"]
