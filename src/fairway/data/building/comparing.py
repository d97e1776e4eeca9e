"""Tokenizers side by side on one text: how far they shorten it, how fast, what they lose, and how well a small model
foretells the text through them.

The small model is an interpolated n-gram of tokens after Witten and Bell (IEEE Trans. Inf. Theory 37, 1991, method C),
learned on the first half of the documents and scored on the second. With c(h, x) the count of x after the context h,
c(h) their sum and u(h) how many different tokens came after h,

    p(x | h) = (c(h, x) + u(h) p(x | h')) / (c(h) + u(h)),    h' the context without its first token,

down from ORDER - 1 tokens of context to none, below which every token of the vocabulary has 1 / vocab. Every p is a
distribution over the vocabulary. Contexts begin anew with each document's BOS, which is given, not paid. The bits of
the second half's tokens are divided by the bytes of its original text; where a tokenizer loses text, the figure is one
of an easier text and is marked. With more pieces, as many tokens see further back: that is such a tokenizer's merit,
and the figure says how much of it a small model can use, not what a large one would make of either.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fairway.base.errors import DataError
from fairway.data.building.encoding import Encoder
from fairway.data.splits import Uint16
from fairway.data.tokenizer import Tokenizer

ORDER = 4  # tokens: three of context; four of 16 bits fit into 64
Grams = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Row:
    """One tokenizer. words: runs of what is no white space; megabytes_per_second: encoding in one thread, SentencePiece
    with the build's memory of words; lost: documents that do not come back; bits_per_byte: of the small model."""

    name: str
    sha256: str
    pieces: int
    tokens: int
    bytes_per_token: float
    tokens_per_word: float
    megabytes_per_second: float
    lost: int
    bits_per_byte: float


def compare(tokenizer: Tokenizer, documents: Sequence[bytes]) -> Row:
    """One tokenizer on some documents. DataError where they are too few to be halved."""
    if len(documents) < 2:
        raise DataError("the text is one document; two at least are needed, one half to learn and one to score: cut it")
    encoder, begun = Encoder(tokenizer), time.process_time()
    encodings = [encoder.encode(document) for document in documents]
    seconds = time.process_time() - begun
    size, tokens = sum(map(len, documents)), sum(len(encoding.tokens) for encoding in encodings)
    words = sum(len(document.split()) for document in documents)
    half = _half(documents)
    bits = code_length(
        [e.tokens for e in encodings[:half]], [e.tokens for e in encodings[half:]], tokenizer.size, tokenizer.bos
    )
    return Row(
        tokenizer.name,
        tokenizer.sha256,
        tokenizer.size,
        tokens,
        size / max(tokens, 1),
        tokens / max(words, 1),
        size / 1e6 / max(seconds, 1e-9),
        sum(encoding.text != document for encoding, document in zip(encodings, documents, strict=True)),
        bits / sum(map(len, documents[half:])),
    )


def code_length(learned: Sequence[Uint16], scored: Sequence[Uint16], vocab: int, bos: int) -> float:
    """Bits of the scored documents' tokens after the learned ones."""
    past, future = _stream(learned, bos), _stream(scored, bos)
    paid = future != bos
    probabilities = np.full(len(future), 1 / vocab)
    for order in range(1, ORDER + 1):
        probabilities = _interpolated(_grams(past, order, bos), _grams(future, order, bos), past != bos, probabilities)
    return float(-np.log2(probabilities[paid]).sum())


def _interpolated(
    past: Grams, future: Grams, counted: npt.NDArray[np.bool_], below: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """p of every future gram's last token, from that of one order below. counted: past grams that are learned from."""
    grams, counts = np.unique(past[counted], return_counts=True)
    contexts, first, kinds = np.unique(grams >> np.uint64(16), return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first) if len(first) else np.zeros(0, np.int64)
    seen = _found(grams, counts, future)
    total, kind = (_found(contexts, values, future >> np.uint64(16)) for values in (totals, kinds))
    found: npt.NDArray[np.float64] = np.where(total > 0, (seen + kind * below) / np.maximum(total + kind, 1), below)
    return found


def _found(keys: Grams, values: npt.NDArray[np.int64], asked: Grams) -> npt.NDArray[np.int64]:
    """The value of each key that is asked for, 0 where it is unknown."""
    if not len(keys):
        return np.zeros(len(asked), dtype=np.int64)
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


def _grams(stream: npt.NDArray[np.uint64], order: int, bos: int) -> Grams:
    """(N,) each token with the order - 1 before it, 16 bits each; nothing before a document's BOS is seen (it stands in
    for all of that)."""
    starts = np.maximum.accumulate(np.where(stream == bos, np.arange(len(stream)), 0))
    grams = np.zeros(len(stream), dtype=np.uint64)
    for back in range(order - 1, -1, -1):
        at = np.maximum(np.arange(len(stream)) - back, starts)
        grams = (grams << np.uint64(16)) | stream[at]
    return grams


def _stream(documents: Sequence[Uint16], bos: int) -> npt.NDArray[np.uint64]:
    parts = [np.append(np.uint16(bos), tokens) for tokens in documents]
    return np.concatenate(parts).astype(np.uint64)


def _half(documents: Sequence[bytes]) -> int:
    """How many documents make the first half of the bytes: one at least, and not all."""
    ends = np.cumsum([len(document) for document in documents])
    return min(max(1, int(np.searchsorted(ends, math.ceil(ends[-1] / 2)))), len(documents) - 1)
