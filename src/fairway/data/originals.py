"""Whether the text that token shards decode to is the one that they were made from, as their sidecars know it.

A sidecar (building/sidecar.py) holds of each document how many bytes it was, how many its tokens decode to, and the
beginning of its sha256. Where every document has the booked hash, the text is the original, and so are its bytes, which
a score divides by. Where a tokenizer loses text, what is scored is the decoded text, divided by its own bytes, and the
score says so; the original's bytes are booked beside it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.data.building import sidecar
from fairway.data.splits import Shard, Uint16
from fairway.data.tokenizer import Tokenizer


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) reads token shards."""
    return bool(recipe["data"]["source"]["kind"] == "shards")


def confirmed(shards: Sequence[Shard], tokens: Uint16, tokenizer: Tokenizer, text: bytes, run: Run) -> bool:
    """Whether `text`, which the shards' tokens decode to, is the original; False too where a shard has no sidecar.

    DataError, naming the document, where a sidecar is not of these tokens or of this tokenizer.
    """
    paths = [sidecar.path_of(shard.path) for shard in shards]
    if not all(path.exists() for path in paths):
        return False
    lengths = tokenizer.byte_lengths(tokens[1:], tokens[:-1])
    offsets = np.concatenate(([0, 0], np.cumsum(lengths)))  # of the text, before each token and at the end
    rows, starts, begin = list[sidecar.Rows](), list[int](), 0
    for path, shard in zip(paths, shards, strict=True):
        booked = sidecar.read(path)
        places = booked[:, sidecar.START].astype(np.int64) - shard.first
        inside = (places >= 0) & (places < len(shard.tokens))
        if not np.array_equal(places[inside], np.flatnonzero(shard.tokens == tokenizer.bos)):
            raise DataError(f"{path}: its documents do not begin where {shard.path.name} has BOS; build both again")
        rows.append(np.asarray(booked[inside]))
        starts += (places[inside] + begin).tolist()
        begin += len(shard.tokens)
    table, exact = np.concatenate(rows), 0
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True)):
        document = text[offsets[start] : offsets[end]]
        if len(document) != table[number, sidecar.DECODED]:
            raise DataError(
                f"{paths[0].parent}: held-out document {number} decodes to {len(document):,} bytes, its sidecar says "
                f"{int(table[number, sidecar.DECODED]):,}; name the tokenizer that made these shards"
            )
        exact += int.from_bytes(hashlib.sha256(document).digest()[:8], "big") == table[number, sidecar.KEY]
    original = int(table[:, sidecar.BYTES].sum())
    run.fact("originals", documents=len(starts), exact=exact, original_bytes=original, decoded_bytes=len(text))
    return exact == len(starts) > 0 == starts[0] and original == len(text)
