"""What the tests of a build share: documents by their tokens, and the hashes of all that stands in a folder."""

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np

from fairway.data.sources.shards import open_shard


def read_back(folder: Path, split: str, tokenizer) -> list[bytes]:
    """The documents of a split by its tokens alone."""
    tokens = np.concatenate([np.zeros(0, np.uint16), *(open_shard(p).tokens for p in shards(folder, split))])
    starts = [*np.flatnonzero(tokens == tokenizer.bos), len(tokens)]
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in pairwise(starts)]


def shards(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"fineweb_{split}_*.bin"))


def contents(folder: Path) -> dict[str, str]:
    """Every file but the lock, by its hash."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != ".lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
