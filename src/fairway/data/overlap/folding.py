"""What counts as the same text: letters folded to one case, every run of white space to one space, none at the ends.

Case folding and white space are Unicode's, as Python's `str.casefold` and `str.split` have them; bytes that are no
UTF-8 stay as they are. Both look at one character alone, so that only what is not ASCII has to become text, which
is most of the work saved on Wikipedia (not timed apart).
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

_SPACES = bytes(32 if chr(byte).isspace() and byte < 128 else byte for byte in range(256))


def folded(document: bytes) -> bytes:
    """The text that two documents are compared by."""
    text = document.lower()
    if not text.isascii():
        text = b"".join(_parts(text))
    text = text.translate(_SPACES)
    while b"  " in text:
        text = text.replace(b"  ", b" ")
    return text.strip(b" ")


def key_of(document: bytes) -> bytes:
    """What a document is recognised by: 16 bytes of a hash of its folded text."""
    return hashlib.blake2b(folded(document), digest_size=16).digest()


def _parts(text: bytes) -> Iterator[bytes]:
    """The text with what is not ASCII folded: run by run, or as a whole where there is much of it."""
    wide = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) >= 128)
    if len(wide) > len(text) // 8:
        yield _folded.__wrapped__(text)
        return
    breaks = np.flatnonzero(np.diff(wide) > 1)
    starts, ends = wide[np.concatenate(([0], breaks + 1))], wide[np.concatenate((breaks, [-1]))] + 1
    at = 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield text[at:start]
        yield _folded(text[start:end])
        at = end
    yield text[at:]


@lru_cache(1 << 16)
def _folded(run: bytes) -> bytes:
    """A run of bytes that are not ASCII: whole characters, and whatever is none."""
    text = run.decode("utf-8", "surrogateescape").casefold()
    return "".join(" " if c.isspace() else c for c in text).encode("utf-8", "surrogateescape")
