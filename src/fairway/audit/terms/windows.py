"""Where it was decided which targets of a window count: the end of a slice of losses, a mask, a list of windows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from fairway.audit.terms.targets import Contribution
from fairway.audit.terms.term import Term, peel, walk

_ELEMENTS = frozenset(("each", "item", "merge", "round"))
_MOST = 20_000  # terms


def begun(contribution: Contribution) -> Term | None:
    """How the beginning of `nll[i, first:end]` is worked out; None where it is none, or taken from a list."""
    for term in walk(contribution.term):
        if term.op == "item" and "score" in contribution.kinds(term.parts[0]):
            for low in _beginnings(term.parts[1]):
                if low.op not in _ELEMENTS and low.line:
                    return low
    return None


def cut(contribution: Contribution) -> Term | None:
    """How the beginning of the targets is worked out where rows of several windows lie beside each other,
    `y[i, first:end]`; None where it is none, or taken from a list."""
    for target in contribution.targets:
        for term in walk(target):
            if term.op == "item" and term.parts[1].op == "tuple" and term.parts[1].parts[0].op != "slice":
                for low in _beginnings(term.parts[1]):
                    if low.op not in _ELEMENTS and low.line:
                        return low
    return None


def masked(contribution: Contribution) -> Term | None:
    """The comparison with places, `place >= first`, of the mask nearest to the score that says which losses count, or
    where its places are set, `mask[i, first:end] = True`; or else those that the target is read at. None where there is
    none."""
    for root in (contribution.term, *contribution.targets):
        for term in _nearest(root):
            for mask, what in _masks(term):
                own = root is not contribution.term or "score" in contribution.kinds(what)
                tests = _tests(mask) if own and not contribution.kinds(mask) else []
                if tests:
                    return min(tests, key=lambda one: one.value not in (">=", ">"))
                filled = next(_filled(mask), None) if own else None
                if filled is not None:
                    return filled
    return None


def _filled(mask: Term) -> Iterator[Term]:
    """mask[i, first:end] = True: the stores of a constant from some place on."""
    for one in _nearest(mask):
        constant = one.op == "store" and one.value is None and one.parts[2].constant() in (True, 1.0)
        if constant and any(low.op not in _ELEMENTS and low.line for low in _beginnings(one.parts[1])):
            yield one


def _tests(mask: Term) -> list[Term]:
    return [one for one in _nearest(mask) if one.op == "compare" and any(map(_is_place, one.parts))]


def listed(contribution: Contribution) -> Term | None:
    """The windows `plan.append((start, end, first))` that a slice of losses, or else anything, is taken from."""
    for term in walk(contribution.term):
        if term.op == "item" and "score" in contribution.kinds(term.parts[0]):
            for low in _beginnings(term.parts[1]):
                found = next(_appended(low), None)
                if found is not None:
                    return found
    return next(_appended(contribution.term), None)


def _nearest(root: Term) -> Iterator[Term]:
    """All that a value is made of, each once, the nearest first."""
    waiting, seen = deque([root]), {id(root)}
    while waiting and len(seen) < _MOST:
        term = waiting.popleft()
        yield term
        new = [part for part in term.parts if id(part) not in seen]
        seen.update(map(id, new))
        waiting.extend(new)


def _masks(term: Term) -> Iterator[tuple[Term, Term]]:
    """(mask, what it is a mask of)"""
    if term.op == "item" and term.parts[1].op != "slice":
        yield term.parts[1], term.parts[0]
    elif term.called == "where" and len(term.parts) == 3:
        yield term.parts[0], term.parts[1]
    elif term.called in ("masked_select", "masked_fill") and len(term.parts) > 1:
        yield term.parts[1], term.parts[0]
    elif term.op == "op" and term.value == "*":
        yield term.parts[0], term.parts[1]
        yield term.parts[1], term.parts[0]


def _is_place(term: Term) -> bool:
    """arange(width), or what is made of it by sums, bounds and shapes."""
    below = peel(term)
    while below.op == "item" or below.called in ("clamp", "clamp_min", "clamp_max", "minimum", "maximum"):
        inner = below.parts[0] if below.op == "item" else below.operand()
        if inner is None:
            return False
        below = peel(inner)
    if below.op == "op" and below.value in ("+", "-", "*"):
        return any(map(_is_place, below.parts))
    return below.called == "arange"


def _beginnings(index: Term) -> Iterator[Term]:
    for part in index.parts if index.op == "tuple" else (index,):
        cut = peel(part)
        if (cut.op == "slice" or (cut.called == "slice" and len(cut.parts) > 1)) and cut.parts[0].op != "const":
            yield peel(cut.parts[0])


def _appended(root: Term) -> Iterator[Term]:
    """What is added to a list as several numbers together."""
    for term in walk(root):
        if term.op == "mutate" and term.value == ".append":
            added = term.parts[-1]
            if added.op == "tuple" and len(added.parts) > 1 and any(part.op != "const" for part in added.parts):
                yield added


__all__ = ["begun", "cut", "listed", "masked"]
