"""Where a value of the token before is mixed into a token's own: e + g * before(e), however it is written."""

import itertools
from collections.abc import Iterable, Iterator

from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, any_below, peel, same, walk

_JOINING = frozenset("cat concatenate stack concat".split())  # noqa: SIM905
_SUMS = frozenset("add lerp addcmul add_ lerp_ addcmul_".split())  # noqa: SIM905
_ARITHMETIC = frozenset("mul mul_ where masked_fill add sub neg multiply".split())  # noqa: SIM905
_ASKS = frozenset("eq ne isin not_equal equal".split())  # noqa: SIM905
_SHAPES = frozenset("ones_like zeros_like full_like empty_like size".split())  # noqa: SIM905
_SINCE = frozenset("cummax cummin cumsum".split())  # how far a document's start lies back: `since >= 1`  # noqa: SIM905
_HASHES = frozenset("bitwise_xor remainder fmod".split())  # noqa: SIM905
_MOST = 60  # terms of one sum that are looked at


def smears(nodes: Iterable[Term], streams: Streams) -> Iterator[Term]:
    """The sums, among these terms, of a value and the same value one position earlier, with nothing in them that asks
    which token stands there. Token ids themselves (a hash of two of them) are no such value."""
    listed = list(nodes)
    asked = [term for term in listed if term.called == "where" and _asks(term.parts[:1], streams)]
    for term in listed:
        for operands in _sums(term):
            whole = _smeared(operands, streams)
            if whole is None or _asks(operands, streams, whole) or _is_difference(term, whole):
                continue
            if not any(peel(part) is term for each in asked for part in each.parts[1:]):
                yield term


def _sums(term: Term) -> Iterator[tuple[Term, ...]]:
    """What a term adds up, in its parts."""
    written = term.op == "op" and term.value in ("+", "-") and len(term.parts) == 2
    if written or (term.op == "call" and term.called in _SUMS):
        yield term.parts


def _is_difference(term: Term, whole: Term) -> bool:
    """before(e) - e alone: a part of e + g * (before(e) - e), which is looked at as a whole."""
    if term.value != "-":
        return False
    plain = [_same(part, whole) for part in term.parts]
    return any(plain) and any(
        _earlier(part) is not None for part, is_it in zip(term.parts, plain, strict=True) if not is_it
    )


def _smeared(operands: tuple[Term, ...], streams: Streams) -> Term | None:
    """The value that stands in one operand as it is, and in another one position earlier."""
    reached = [list(_reached(part)) for part in operands]
    for n, terms in enumerate(reached):
        for term in terms:
            whole = _earlier(term)
            if whole is None or streams.is_stream(whole) or not _is_made(whole):
                continue
            others = [each for m, found in enumerate(reached) if m != n for each in found]
            if any(_is_it(other, whole) for other in others):
                return whole
    return next(_looked_up_twice(reached), None)


def _looked_up_twice(reached: list[list[Term]]) -> Iterator[Term]:
    """e(ids) of e(ids) + g * e(before): one table's rows for each token and for another one."""
    looked = [[term for term in terms if _is_lookup(term)] for terms in reached]
    for one, other in itertools.combinations(range(len(looked)), 2):
        for mine, theirs in itertools.product(looked[one], looked[other]):
            if mine.called == theirs.called and _same(mine.parts[0], theirs.parts[0]) and not _same(mine, theirs):
                yield mine


def _is_lookup(term: Term) -> bool:
    """A layer of an object, called with ids as they are: self.embedding(ids). A hash of two tokens is a row of both."""
    ids = peel(term.parts[1]) if term.op == "call" and len(term.parts) == 2 else None
    hashed = ids is not None and (ids.op == "op" or ids.called in _ARITHMETIC or ids.called in _HASHES)
    return ids is not None and not hashed and term.parts[0].op == "object" and _is_table(term)


def _is_table(term: Term) -> bool:
    layer = getattr(term.parts[0].value, "attrs", {}).get(term.called)
    return isinstance(layer, Term) and layer.called == "Embedding"


def _reached(term: Term) -> Iterator[Term]:
    """What products, sums and masks are made of: not what lies below a lookup or a layer."""
    waiting, seen = [term], set[int]()
    while waiting and len(seen) < _MOST:
        one = peel(waiting.pop())
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if _earlier(one) is not None:
            continue
        if one.op == "op" or (one.op == "call" and one.called in _ARITHMETIC):
            waiting.extend(one.parts)


def _is_it(term: Term, whole: Term) -> bool:
    """The value itself, or all of it after the first position."""
    if _same(term, whole):
        return True
    slices = _slices(term)
    return any(low == 1 and high is None for low, high in slices) and _same(term.parts[0], whole)


def _same(one: Term, other: Term) -> bool:
    return peel(one) is peel(other) or same(one, other, 6)


def _earlier(term: Term) -> Term | None:
    """x of the same values one position later: x[:-1] alone or behind something, a roll, a pad in front."""
    term = peel(term)
    if term.op == "item":
        if not any(high == -1 and low in (None, 0) for low, high in _slices(term)):
            return None
        base = peel(term.parts[0])
        return _padded(base, behind=None) or base
    if term.op == "store":
        return _earlier(term.parts[2]) or _earlier(term.parts[0])
    if term.op != "call":
        return None
    if term.called == "roll":
        by = term.at(1, "shifts")
        return term.operand() if by is not None and _first(by) == 1 else None
    if term.called == "pad":
        return _padded(term, behind=-1) or _below(term.parts[:1])
    if term.called in _JOINING:
        parts = [each for part in term.parts[:1] for each in (part.parts if part.op in ("list", "tuple") else (part,))]
        return _below(parts[1:])
    if term.called == "narrow":
        begin, length = term.at(2, "start"), term.at(3, "length")
        shorter = length is not None and length.op == "op" and length.value == "-" and length.parts[1].constant() == 1
        return term.operand() if shorter and begin is not None and begin.constant() == 0 else None
    return None


def _below(parts: Iterable[Term]) -> Term | None:
    """The value of which one of these is all but the last position."""
    for part in parts:
        one = peel(part)
        if one.op == "item" or one.called == "narrow":
            found = _earlier(one)
            if found is not None:
                return found
    return None


def _padded(term: Term, behind: int | None) -> Term | None:
    """x of pad(x, (0, 0, 1, behind)): one position more in front, and one less at the end where that is asked."""
    if term.op != "call" or term.called != "pad":
        return None
    sizes = term.at(1, "pad")
    numbers = [part.constant() for part in sizes.parts] if sizes is not None and sizes.op in ("tuple", "list") else []
    if sizes is not None and isinstance(sizes.constant(), (tuple, list)):
        numbers = list(sizes.constant())
    if len(numbers) < 4 or numbers[2] != 1:
        return None
    return term.operand() if behind is None or numbers[3] == behind else None


def _slices(term: Term) -> list[tuple[object, object]]:
    """The ends of the slices of an index, where they are numbers or left out."""
    if term.op != "item":
        return []
    index = term.parts[1]
    parts = index.parts if index.op == "tuple" else (index,)
    cuts = [part.parts for part in parts if part.op == "slice" and len(part.parts) == 3]
    return [(low.constant(), high.constant()) for low, high, _ in cuts if _plain(low) and _plain(high)]


def _plain(term: Term) -> bool:
    return term.op == "const"


def _first(term: Term) -> object:
    return term.parts[0].constant() if term.op in ("tuple", "list") and term.parts else term.constant()


def _is_made(term: Term) -> bool:
    """Whether it was computed or looked up: not a constant or a bare name."""
    return any_below(term, lambda t: t.op in ("call", "item", "op", "object"))


def _asks(operands: Iterable[Term], streams: Streams, whole: Term | None = None) -> bool:
    """Whether something compares tokens in what is added, the value itself aside: a hash of two tokens in it may have
    asked the same question."""

    def within(term: Term) -> bool:
        compared = term.op == "compare" and not any_below(term, lambda t: t.called in _SINCE)
        plans = compared or term.op == "each" or term.called == "tolist" or (term.op, term.value) == ("list", "comp")
        plans = plans or term.called in _SHAPES  # of what it is made of, only the shape
        return not (plans or streams.is_stream(term) or (whole is not None and _same(term, whole)))

    return any(
        (term.op == "compare" and term.value in ("==", "!=")) or (term.op == "call" and term.called in _ASKS)
        for term in walk(*operands, into=within)
    )


__all__ = ["smears"]
