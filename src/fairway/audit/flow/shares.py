"""Places that a slice of a list let through: one process's share, the first N, and what lies before a share."""

from __future__ import annotations

from dataclasses import replace

from fairway.audit.flow.indices import Part, sym_of
from fairway.audit.flow.tokens import Cut
from fairway.audit.flow.values import FIRST, INDEXED, LENGTH, RANKED, Value

WINDOW = 10_000  # tokens: a constant up to this is the length of a window, not a share of the text


def of_rank(value: Value) -> Value:
    """One process's share of a list."""
    items = tuple(of_rank(item) for item in value.items) if value.items is not None else None
    toks = frozenset(replace(tok, ranked=True) for tok in value.toks) if value.raw else value.toks
    return value.but(items=items, toks=toks, env=value.env | RANKED)


def limited(value: Value, limit: float) -> Value:
    """A place in the data of which a constant lets only so many through."""
    items = tuple(limited(item, limit) for item in value.items) if value.items is not None else None
    plain = not (value.toks or value.refs or isinstance(value.const, (str, bool)))
    return value.but(items=items, limit=limit, flags=value.flags | INDEXED) if plain else value.but(items=items)


def indexed(value: Value, cuts: frozenset[Cut]) -> Value:
    """A place in the data that a slice of a list let through."""
    items = tuple(indexed(item, cuts) for item in value.items) if value.items is not None else None
    if value.toks or value.refs or isinstance(value.const, (str, bool)):
        return value.but(items=items)
    return value.but(items=items, cuts=value.cuts | cuts, flags=value.flags | INDEXED)


def first_of(value: Value) -> Value:
    """The first element of a list: where a slice let it through, in each turn of a loop or once, the place at which the
    slice begins."""
    items = tuple(first_of(item) for item in value.items) if value.items is not None else None
    sliced = value.flags & INDEXED and any(cut[0] == "tail" for cut in value.cuts)
    return value.but(items=items, flags=value.flags | FIRST) if sliced or value.spans else value.but(items=items)


def share_of(start: Value, stop: Value) -> frozenset[Cut]:
    """range(start, stop): the cuts of one process's share, or of what lies before it."""
    if not RANKED & stop.env or (stop.flags & LENGTH and stop.sym == "size"):  # the number of one's own windows
        return frozenset()
    if not RANKED & start.env:
        return before_share(Part(None, start, stop, slice=True))
    if not (sym_of(start) and sym_of(stop)):
        return frozenset()
    return frozenset((("tail", sym_of(start), start.less), ("head", sym_of(stop), stop.less)))


def before_share(part: Part) -> frozenset[Cut]:
    """tokens[:start], where a share begins at start: its end, as the share names its beginning."""
    low, high = part.low, part.high
    if not part.slice or high is None or not RANKED & high.env or (low is not None and RANKED & low.env):
        return frozenset()
    if not high.flags & FIRST:
        return frozenset() if high.spans else frozenset((("head", sym_of(high), high.less),))
    added = sum(int(each) for each in high.less if each.lstrip("+").isdigit() and each.startswith("+"))
    if added > WINDOW:
        return frozenset()
    return frozenset(("head", text, less) for kind, text, less in high.cuts if kind == "tail")
