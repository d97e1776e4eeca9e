"""Counts of bytes that are read from a file beside the tokens, and what a script adds to them."""

from __future__ import annotations

from collections.abc import Iterator

from fairway.audit.terms.octets import values
from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, peel


def added_to_sidecar(factor: Term) -> Iterator[Term]:
    """What is added to numbers of a file, each factor of a product by itself; numbers of files are not among it."""
    streams = Streams()
    for term in values(factor):
        if term.op not in ("op", "mutate") or str(term.value) not in ("+", "+=", "add_", "iadd"):
            continue
        sides = [peel(part) for part in term.parts]
        if any(streams.is_stream(side) for side in sides):
            yield from (each for side in sides if not streams.is_stream(side) for each in _product(side))


def _product(term: Term) -> list[Term]:
    """What a product is made of, as far as it is not a number; the term itself where it is none."""
    if term.op != "op" or term.value not in ("*", "<<"):
        return [term]
    return [factor for part in term.parts if part.op != "const" for factor in _product(peel(part))]


__all__ = ["added_to_sidecar"]
