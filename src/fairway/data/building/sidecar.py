"""The sidecar of a shard: where its documents begin, and how many bytes they were.

`fineweb_train_000007.documents` stands beside `fineweb_train_000007.bin`: a header of 256 little-endian int32
(20261125, version 1, the count of documents, of columns, the bits of a token: 16, zeros), then a row of little-endian
uint64 for each document that begins in the shard:

    start     the position of its BOS among the shard's tokens
    bytes     of the original text, before anything was replaced or lost: what a score is divided by
    decoded   bytes that its tokens decode to after a BOS: the same, unless the tokenizer loses text
    key       the first 8 bytes of the original's sha256, big-endian: what it is recognised by
    turn      only in a part of a build: the number of the file or block that it comes from

Tokens are uint16, so that a vocabulary has 65,536 pieces at most; a document may go on in the next shard, whose first
row then starts behind its end.
"""

from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fairway.base.errors import DataError

Rows: TypeAlias = npt.NDArray[np.uint64]  # (documents, columns)

MAGIC, VERSION, HEADER_BYTES, TOKEN_BITS = 20261125, 1, 1024, 16
START, BYTES, DECODED, KEY, TURN = range(5)
COLUMNS = 5  # of a part; a finished shard has no turn


def header(documents: int, columns: int) -> bytes:
    """The sidecar's first 1,024 bytes."""
    numbers = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    numbers[:5] = MAGIC, VERSION, documents, columns, TOKEN_BITS
    return numbers.tobytes()


def path_of(shard: Path) -> Path:
    """Where a shard's sidecar stands."""
    return shard.with_suffix(".documents")


def read(path: Path) -> Rows:
    """(documents, columns) uint64, memory-mapped. DataError names what is wrong with the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            numbers = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no whole header"
        raise DataError(f"{path}: {why}; build the shards again") from error
    if len(numbers) < HEADER_BYTES // 4 or numbers[0] != MAGIC or numbers[1] != VERSION or numbers[4] != TOKEN_BITS:
        raise DataError(f"{path}: no sidecar of version {VERSION}; build the shards again")
    documents, columns = int(numbers[2]), int(numbers[3])
    if documents < 0 or columns not in (COLUMNS - 1, COLUMNS) or size != HEADER_BYTES + 8 * documents * columns:
        raise DataError(f"{path}: {size:,} bytes are not {documents:,} rows of {columns}; build the shards again")
    if not documents:
        return np.zeros((0, columns), dtype=np.uint64)
    return np.memmap(path, dtype="<u8", mode="r", offset=HEADER_BYTES, shape=(documents, columns))
