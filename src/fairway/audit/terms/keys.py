"""Keys of memories: folded into buckets, running over the vocabulary."""

from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, any_below, peel

_MIXERS = frozenset(("%", "&", "^", ">>"))


def is_hashed(key: Term) -> bool:
    """Whether a key is folded into a number of buckets, so that different contexts meet."""
    return any_below(
        key,
        lambda t: (
            (t.op == "op" and t.value in _MIXERS)
            or (t.op == "call" and ("hash" in t.called.lower() or t.called in _HASHERS))
        ),
    )


_HASHERS = frozenset(
    ("remainder", "fmod", "mod", "bitwise_and", "bitwise_xor", "crc32", "adler32", "md5", "sha256", "blake2b", "xxh64")
)


def spans_vocabulary(key: Term, streams: Streams) -> bool:
    """Whether a key runs over all tokens: arange, or the numbers of a long range; not where tokens are cut out."""
    waiting, seen = [key], set[int]()
    while waiting and len(seen) < 400:
        term = peel(waiting.pop())
        if id(term) in seen or streams.is_stream(term):
            continue
        seen.add(id(term))
        if term.op == "call" and term.called in ("arange", "range", "linspace"):
            length = term.parts[-1].constant() if len(term.parts) == 1 else None
            if not isinstance(length, int) or length > _FEW:
                return True
            continue
        waiting.extend(term.parts[:1] if term.op == "item" else term.parts)
    return False


_FEW = 64  # a loop over orders or heads; a vocabulary has at least 256 tokens
