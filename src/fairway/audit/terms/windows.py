"""Where it was decided which targets of a window count: the end of a slice of losses, the list of the windows."""

from __future__ import annotations

from collections.abc import Iterator

from fairway.audit.terms.targets import Contribution
from fairway.audit.terms.term import Term, peel, walk

_ELEMENTS = frozenset(("each", "item", "merge", "round"))


def planned(contribution: Contribution) -> Term | None:
    """What says from which target on a window counts: how the beginning of `nll[i, first:end]` is worked out, or the
    windows `plan.append((start, end, first))` that it is taken from; None where neither is seen."""
    for term in walk(contribution.term):
        if term.op != "item" or "score" not in contribution.kinds(term.parts[0]):
            continue
        for low in _beginnings(term.parts[1]):
            if low.op not in _ELEMENTS and low.line:
                return low
            found = next(_appended(low), None)
            if found is not None:
                return found
    return next(_appended(contribution.term), None)


def _beginnings(index: Term) -> Iterator[Term]:
    for part in index.parts if index.op == "tuple" else (index,):
        if part.op == "slice" and part.parts[0].op != "const":
            yield peel(part.parts[0])


def _appended(root: Term) -> Iterator[Term]:
    """What is added to a list as several numbers together."""
    for term in walk(root):
        if term.op == "mutate" and term.value == ".append":
            added = term.parts[-1]
            if added.op == "tuple" and len(added.parts) > 1 and any(part.op != "const" for part in added.parts):
                yield added


__all__ = ["planned"]
