"""Counts that are worth less the older they are: a row and what it is divided by must age alike."""

from __future__ import annotations

from collections.abc import Iterator

from fairway.audit.terms.gates import Gates
from fairway.audit.terms.rows import sums_of
from fairway.audit.terms.term import Term, layers, peel, same

_SHAPES = frozenset(("view", "reshape", "flatten", "ravel"))
_YOUNG = 0.5  # a factor below that is no ageing
_MOST = 60  # terms of one table


def aged_otherwise(gates: Gates) -> Iterator[Term]:
    """rows[context] / totals[context], of which one is multiplied by 0.998 after each chunk and the other by another
    number, or by none: the second."""
    for _, above, below in gates.ratios():
        rows, lower = gates.lookups(above), gates.lookups(below)
        if sums_of(below, rows):
            continue
        pairs = ((row, count) for row, own in rows for count, key in lower if same(own, key, 10))
        yield from (count for row, count in pairs if _of_two_axes(row) and _of_other_age(row, count))


def _of_other_age(row: Term, count: Term) -> bool:
    one, other = (_table(each) for each in (row, count))
    return one is not other and _factors(one) != _factors(other)


def _table(lookup: Term) -> Term:
    while lookup.op == "item":
        lookup = peel(lookup.parts[0])
    return lookup


def _of_two_axes(row: Term) -> bool:
    """Whether the table of a row begins as zeros(contexts, tokens)."""
    begun = [one for one in _spine(_table(row)) if one.called in ("zeros", "full", "ones")]
    return any(sum(_is_size(part) for part in one.parts) > 1 for one in begun) or any(
        part.op in ("tuple", "list") and len(part.parts) > 1 for one in begun for part in one.parts[:1]
    )


def _is_size(term: Term) -> bool:
    return term.op == "const" and type(term.value) is int and term.value > 1


def _factors(table: Term) -> frozenset[float]:
    """What a table is multiplied by now and then: table.mul_(0.998), table = table * 0.998 + new."""
    found = set()
    for one in _spine(table):
        scaled = (one.op == "mutate" and one.value in (".mul_", "mul_")) or (one.op == "op" and one.value == "*")
        numbers = [part.value for part in one.parts if part.op == "const"] if scaled else []
        found |= {float(each) for each in numbers if isinstance(each, float) and _YOUNG < each < 1.0}
    return frozenset(found)


def _spine(table: Term) -> Iterator[Term]:
    """A table, and what it was before each thing that was done to it, whatever its shape."""
    waiting, seen = [table], set[int]()
    while waiting and len(seen) < _MOST:
        for one in layers(peel(waiting.pop())):
            if id(one) in seen:
                continue
            seen.add(id(one))
            yield one
            if one.called in _SHAPES or (one.op == "op" and one.value in ("+", "*")):
                waiting.extend(one.parts[:1] if one.called in _SHAPES else one.parts)


__all__ = ["aged_otherwise"]
