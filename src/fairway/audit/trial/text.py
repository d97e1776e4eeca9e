"""The short text of a trial, and the small vocabulary that it is written in."""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache

import numpy as np
from numpy.typing import NDArray

BOS = 1
UNIT = 2_048  # windows of most scripts; the text is a whole number of them, so that no tail is left
LENGTH = 20 * UNIT + 1  # tokens: one and a quarter of the usual chunks of 32,768
TRAIN = 600_000  # tokens of a training file
FEWER = 40_000  # of one beside a text of a few hundred: of windows of 32 tokens the other has 18,000
DOCUMENT = 4_096  # tokens of a document: of many scripts, rows of documents side by side end together
LONGER = 5 * DOCUMENT  # where one would begin
ODD = 1_500  # tokens by which it begins later: two documents that windows and chunks do not fit
SHORT = 2 * DOCUMENT + 1  # tokens of a shorter text


length: ContextVar[int] = ContextVar("length", default=LENGTH)
"""The tokens of the text in the trial under way: as many, or only the first few documents of them."""


given: ContextVar[NDArray[np.uint16] | None] = ContextVar("given", default=None)
"""The ids of the text in the trial under way, where they are others than `tokens` makes up."""


def tokens(vocabulary: int) -> NDArray[np.uint16]:
    """The ids of a vocabulary, documents beginning with BOS."""
    ids = given.get()
    return _made_up(vocabulary) if ids is None else ids


@cache
def _made_up(vocabulary: int) -> NDArray[np.uint16]:
    generator = np.random.default_rng(7)
    ids = generator.integers(3, min(vocabulary, 1_000), LENGTH).astype(np.uint16)
    ids[: LENGTH - 1 : DOCUMENT] = BOS
    ids[[LONGER, LONGER + ODD]] = ids[LONGER + ODD], BOS
    return ids


__all__ = ["BOS", "DOCUMENT", "FEWER", "LENGTH", "SHORT", "TRAIN", "UNIT", "given", "length", "tokens"]
