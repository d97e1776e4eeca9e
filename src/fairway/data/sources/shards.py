"""The challenge's token shards: `fineweb_train_*.bin` and `fineweb_val_*.bin` in one folder, memory-mapped.

A shard is a header of 256 little-endian int32 (20240520, version 1, the count of tokens, zeros), then as many
little-endian uint16 tokens. There is no original text here: bytes are those that the tokens decode to, and the score
says so. (TECHNIQUES: the data format of openai/parameter-golf.)
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairway.base.errors import DataError, RecipeError
from fairway.data.splits import Parts, Shard

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 1024


@dataclass(frozen=True)
class Spec:
    """Which files of the folder are which."""

    train: str = "fineweb_train_*.bin"
    valid: str = "fineweb_val_*.bin"
    train_shards: int = 0  # the first so many training shards; 0 = all

    def __post_init__(self) -> None:
        if self.train_shards < 0:
            raise ValueError(f"train_shards = {self.train_shards}: 0 (all) or more is needed")


def load(spec: Spec, path: str) -> Parts:
    """The shards of the folder `path`, each checked in its header and size."""
    if not path:
        raise RecipeError("data.path: not set; with data.source = shards name the folder of the .bin files")
    folder = Path(path)
    train, valid = sorted(folder.glob(spec.train)), sorted(folder.glob(spec.valid))
    for pattern, found in ((spec.train, train), (spec.valid, valid)):
        if not found:
            raise DataError(f"{folder}: no file named {pattern}; set data.path to the folder that holds the shards")
    if shared := set(train) & set(valid):
        raise RecipeError(f"data.source: {min(shared).name} is both training and held-out; set train and valid apart")
    train = train[: spec.train_shards or None]
    return Parts(train_shards=tuple(map(open_shard, train)), valid_shards=tuple(map(open_shard, valid)))


def open_shard(path: Path) -> Shard:
    """One shard, memory-mapped. DataError names the file and what is wrong with its header or size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}; fetch the shard again") from error
    if len(header) < HEADER_BYTES // 4:
        raise DataError(f"{path}: {size:,} bytes are too few for the header of {HEADER_BYTES:,}; fetch the shard again")
    magic, version, count = (int(number) for number in header[:3])
    if magic != MAGIC:
        raise DataError(f"{path}: begins with {magic}, not with {MAGIC}; this is not a token shard")
    if version != VERSION:
        raise DataError(f"{path}: version {version}; only version {VERSION} can be read")
    if count < 1 or size != HEADER_BYTES + 2 * count:
        expected = f"{HEADER_BYTES + 2 * count:,} bytes for its {count:,} tokens"
        raise DataError(f"{path}: {size:,} bytes, not {expected}; the file is cut short or damaged: fetch it again")
    return Shard(path, np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,)))


def write_shard(path: Path, tokens: "np.typing.NDArray[np.uint16]") -> None:
    """Writes tokens as a shard, whole or not at all."""
    from fairway.base import files

    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with files.atomic(path) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").tobytes())
