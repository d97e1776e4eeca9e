"""The text that is weighed, and the made-up model: a few tokens in a pattern that repeats, with a little noise."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fairway.audit.trial.text import BOS
from fairway.audit.trial.vocabulary import FIRST_PIECE

PIECES: Final = 320  # of the vocabulary: rows of a batch of windows over 1,024 pieces would be too large
WINDOW: Final = 64  # tokens, of windows that are longer in the script: the text is a whole number of them
TOKENS: Final = 321  # of the text: five chunks of 64 targets, the stride of most scripts
SECOND: Final = 3 * WINDOW  # where the second document begins: what is learned document by document has one to learn
ALPHABET: Final = np.array([FIRST_PIECE + n for n in (41, 42, 44, 47, 53, -190, 57)], dtype=np.int64)
"""What the model gives a probability: pieces of which some begin a word, a byte, and a piece that never comes; the
model gives more to those that begin none than what comes at the end does, and less where the text is turned."""
_BYTE = 5  # the place of the byte
_UNSEEN = 2.6  # its logit: a third or half of all, so that what is kept from it is missed
OTHERS: Final = ((FIRST_PIECE + 15, PIECES // 10), (FIRST_PIECE + 16, PIECES - PIECES // 10 - len(ALPHABET)))
"""Of those that it gives none: one that begins a word, another that does not, and how many are like it. Pseudo-counts
lie on them."""
TWINS: Final = (FIRST_PIECE + 17, FIRST_PIECE + 19)
"""Two of those that the last one stands for: where each token has a hashed place of its own, none stands for others."""
_PATTERN = 12  # tokens: contexts of several orders come again and again
TURNS: Final = (8,)  # of the pattern, so that the last context is hardly ever followed by a word's begin
FRESH: Final = -1
"""Instead of a turn: before the last token stands one that was never met, and no table knows what follows it."""
_NOISE = 0.12  # of the tokens, so that no context is always followed by the same
_CLEAN = 40  # tokens at the end without noise: the last context was met before
_NEVER = -40.0  # the logit of all other tokens


@cache
def text(last: int | None, turned: int = 0) -> NDArray[np.uint16]:
    """The ids of two documents. last: what stands at the end; None: what the pattern has there. turned: by how many
    tokens the pattern begins earlier, so that it ends in another context; or FRESH."""
    generator = np.random.default_rng(11)
    many = len(ALPHABET) - 1
    pattern = np.roll(generator.integers(0, many, _PATTERN), max(turned, 0))
    picked = np.resize(pattern, TOKENS - 1)
    noisy = generator.random(TOKENS - 1) < _NOISE
    noisy[-_CLEAN:] = False
    picked = np.where(noisy, generator.integers(0, many, TOKENS - 1), picked)
    ids = np.concatenate([[BOS], ALPHABET[picked]]).astype(np.uint16)
    ids[SECOND] = BOS
    if turned == FRESH:
        ids[-2] = OTHERS[-1][0]
    if last is not None:
        ids[-1] = last
    ids.flags.writeable = False
    return ids


HALF: Final = TOKENS // 2  # from here on another text may go on
LATE: Final = 4 * WINDOW  # or from here: what a hint must have seen three times, chunk by chunk, was not seen before


@cache
def otherwise(end: int = TOKENS, since: int = HALF) -> NDArray[np.uint16]:
    """The text, but every token from one on, up to an end, is another."""
    ids = text(None).astype(np.int64)
    turn = {int(each): int(after) for each, after in zip(ALPHABET[:-1], np.roll(ALPHABET[:-1], 1), strict=True)}
    ids[since:end] = [turn.get(each, each) for each in ids[since:end].tolist()]
    made = ids.astype(np.uint16)
    made.flags.writeable = False
    return made


TELLING: Final = frozenset((int(ALPHABET[_BYTE]), *(last for last, _ in OTHERS)))
"""A byte, and pieces of both kinds that the model gives nothing."""


def alternatives(turned: int = 0) -> dict[int, int]:
    """What may stand at the end, and for how many tokens it stands. First what a cache would say: the pattern's own,
    and what follows the last token most often; then one of each kind."""
    ids = text(None, turned).astype(np.int64)
    after = ids[1:-1][ids[:-2] == ids[-2]]
    often = [int(np.bincount(after).argmax())] if after.size else []
    many = dict(OTHERS)
    tried = dict.fromkeys([int(ids[-1]), *often, int(ALPHABET[_BYTE]), *many, *ALPHABET.tolist()], 1)
    return tried | many


@cache
def logits() -> NDArray[np.float32]:
    """Of the token after each place of the text, [tokens, pieces]. They hang on the place alone."""
    made = np.full((TOKENS + 1, PIECES), _NEVER, np.float32)
    made[:, ALPHABET] = np.random.default_rng(12).uniform(0.0, 2.0, (TOKENS + 1, len(ALPHABET)))
    made[:, ALPHABET[-1]] = _UNSEEN
    made.flags.writeable = False
    return made


@cache
def losses() -> NDArray[np.float32]:
    """-log softmax of them."""
    made = logits()
    return np.asarray(np.log(np.exp(made).sum(axis=-1, keepdims=True)) - made)


__all__ = [
    "ALPHABET",
    "OTHERS",
    "PIECES",
    "SECOND",
    "TOKENS",
    "TWINS",
    "WINDOW",
    "alternatives",
    "logits",
    "losses",
    "text",
]
