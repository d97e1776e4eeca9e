"""Places of the data in the order of what stands there: of two alike, the earlier one comes first.

`by = argsort(hashes, kind="stable")` puts the places of each context side by side, so that what stands before a place
is its last earlier occurrence. To read it from there looks back, though all of the text is sorted at once; to read
what stands behind it looks ahead.
"""

from __future__ import annotations

from fairway.audit.flow.indices import Part
from fairway.audit.flow.values import LATER, LENGTH, MASK, POSITIONS, RAW, SORTED, Value

_KEEPS = ("stable", "mergesort")


def in_text_order(name: str, flats: list[Value], kwargs: dict[str, Value]) -> bool:
    """Whether a sort of tokens, or of what was computed from them, keeps alike ones in the order of the text."""
    keys = flats[:1]
    if name == "lexsort" and flats and flats[0].toks:
        return True
    if not keys or not keys[0].raw or keys[0].flags & LENGTH or name not in ("argsort", "sort"):
        return False
    kind = kwargs.get("kind")
    stable = kwargs.get("stable")
    kept = (kind is not None and kind.const in _KEEPS) or (stable is not None and stable.const is True)
    return kept or bool(keys[0].flags & POSITIONS)  # hash * n + arange(n): no two are alike


def sorted_places(name: str, flats: list[Value], kwargs: dict[str, Value]) -> Value:
    """What such a sort gives: places, and from torch.sort the sorted ones before them."""
    places = Value(flags=LENGTH | SORTED)  # all of them, whichever turn of a loop has sorted them
    if name == "sort" and "stable" in kwargs:
        return Value(items=(flats[0].but(flags=flats[0].flags | SORTED), places))
    return flats[0].but(flags=flats[0].flags | SORTED) if name == "sort" else places


def order_of(value: Value, parts: list[Part], keys: list[Value]) -> int:
    """The flags of what an index takes: out of order, all but the first of it, or at places that are."""
    flags = 0
    for key in keys:
        if key.flags & SORTED and not key.flags & MASK:
            flags |= key.flags & (SORTED | LATER)
    later = value.flags & SORTED and not value.flags & MASK and _all_but_first(parts)
    return flags | (LATER if later else 0)


def looks_ahead(value: Value, parts: list[Part]) -> bool:
    """Whether what is written is, for each of its places, of the next one alike."""
    keys = [part.value for part in parts if part.value is not None]
    there = _all_but_first(parts) or any(key.flags & LATER and not key.flags & MASK for key in keys)
    return bool(value.flags & LATER and value.raw and not value.flags & MASK) and not there


def aligned(value: Value, parts: list[Part]) -> Value:
    """What is written: beside itself, no longer the next one; back to the places of the text, tokens of other places,
    which are no answers there."""
    if any(part.value is not None and part.value.flags & SORTED and not part.value.flags & MASK for part in parts):
        return value.but(flags=value.flags & ~(RAW | LATER | SORTED))
    return value.but(flags=value.flags & ~LATER) if value.flags & LATER and _all_but_first(parts) else value


def _all_but_first(parts: list[Part]) -> bool:
    """[1:], [2:]"""
    lows = [part.low.const for part in parts if part.slice and part.low is not None]
    return any(isinstance(low, int) and low > 0 for low in lows)
