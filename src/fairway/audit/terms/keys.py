"""Keys of memories: folded into buckets, running over the vocabulary."""

from collections.abc import Callable

from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, any_below, peel, same

_MIXERS = frozenset(("%", "&", "^", ">>"))


def is_hashed(key: Term, streams: Streams) -> bool:
    """Whether a key is folded into a number of buckets, so that different contexts meet; how the tokens in it were
    found in their stream is no fold."""
    return any_below(
        key,
        lambda t: (
            (t.op == "op" and t.value in _MIXERS)
            or (t.op == "call" and ("hash" in t.called.lower() or t.called in _HASHERS))
        ),
        into=lambda t: not streams.is_stream(t),
    )


_HASHERS = frozenset(
    ("remainder", "fmod", "mod", "bitwise_and", "bitwise_xor", "crc32", "adler32", "md5", "sha256", "blake2b", "xxh64")
)


def folds(key: Term, tokens: list[Term], streams: Streams) -> bool:
    """Whether different tokens of one context may share a place: the key is folded after the tokens came into it. A
    context that was folded before is a row; its tokens have places of their own in (row, token), row * V + token."""

    def holds(term: Term) -> bool:
        return any_below(term, lambda t: streams.is_stream(t) and any(same(t, token, 10) for token in tokens))

    waiting = [key]
    while waiting:
        term = peel(waiting.pop())
        if streams.is_stream(term) or not holds(term):
            continue
        if term.op == "op" and term.value == "%" and _whole_rows(term.parts[0], term.parts[1], holds):
            continue
        if (term.op == "op" and term.value not in _PLAIN) or (term.op == "call" and term.called not in _SHAPED):
            return True
        waiting.extend(term.parts)
    return False


_PLAIN = frozenset(("+", "*"))
_SHAPED = frozenset(("where", "stack", "add", "mul", "multiply", "clamp", "clamp_min"))


def _whole_rows(number: Term, buckets: Term, holds: Callable[[Term], bool]) -> bool:
    """(row * V + token) % (rows * V): the fold drops whole rows."""
    number, buckets = peel(number), peel(buckets)
    if number.op != "op" or number.value != "+":
        return False
    for scaled, token in (number.parts, number.parts[::-1]):
        scaled = peel(scaled)
        if scaled.op != "op" or scaled.value != "*" or holds(scaled) or peel(token).op == "op":
            continue
        for width in scaled.parts:
            size, count = width.constant(), buckets.constant()
            if type(size) is int and type(count) is int and size > _FEW:
                return count % size == 0
            if buckets.op == "op" and buckets.value == "*" and any(same(width, part, 8) for part in buckets.parts):
                return True
    return False


def spans_vocabulary(key: Term, streams: Streams) -> bool:
    """Whether a key runs over all tokens: arange, or the numbers of a long range; not where tokens are cut out, nor
    where a hash is looked up in one of several tables, `counts[arange(documents)[:, None], slots]`."""
    last = key.parts[-1] if key.op == "tuple" and key.parts else key
    waiting, seen = [last if is_hashed(last, streams) else key], set[int]()
    while waiting and len(seen) < 400:
        term = peel(waiting.pop())
        if id(term) in seen or streams.is_stream(term):
            continue
        seen.add(id(term))
        if term.op == "call" and term.called in ("arange", "range", "linspace"):
            bounds = [part.constant() for part in term.parts[:2]]
            if not all(isinstance(each, int) for each in bounds) or bounds[-1] - sum(bounds[:-1]) > _FEW:
                return True
            continue
        if term.called in _SHAPES or (term.op == "item" and streams.from_tokens(term.parts[1])):  # salts[target]
            continue
        if term.op == "store":  # where it is put says nothing of what it holds
            waiting.extend((term.parts[0], term.parts[2]))
        elif term.op != "compare":
            waiting.extend(term.parts[:1] if term.op == "item" else term.parts)
    return False


_SHAPES = frozenset("len numel size zeros ones empty full zeros_like ones_like empty_like full_like".split())  # noqa: SIM905
_FEW = 64  # a loop over orders or heads; a vocabulary has at least 256 tokens
