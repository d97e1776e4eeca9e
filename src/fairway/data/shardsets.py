"""The token shards of a folder, by split, with the tokenizer beside them: what is examined, not what a run reads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairway.base.errors import DataError, RecipeError
from fairway.base.files import read
from fairway.data.sources.shards import open_shard
from fairway.data.splits import Shard
from fairway.data.tokenizer import Tokenizer

RECEIPT = "fetched.json"  # what a fetch leaves beside the shards: where each file came from, its size and hash
BOS = 1  # of the challenge's tokenizers, where none is at hand to say it
_NUMBER = re.compile(r"[_.-]?\d*\.bin$")


@dataclass(frozen=True, eq=False)
class ShardSet:
    """Shards that are one stream of tokens. name: what their files' names share, such as fineweb_train."""

    name: str
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        return sum(len(shard.tokens) for shard in self.shards)


def shard_sets(place: Path) -> list[ShardSet]:
    """The shards of a folder, or one file, each checked in its header and size. DataError where there is none."""
    if place.is_dir():
        try:
            paths = sorted(path for path in place.iterdir() if path.suffix == ".bin" and path.is_file())
        except OSError as error:
            raise DataError(f"{place}: {error.strerror}; name a folder that can be read") from error
        if not paths:
            raise DataError(f"{place}: no .bin file in it; name a folder of token shards, or one shard")
    else:
        paths = [place]
    sets = dict[str, list[Shard]]()
    for path in paths:
        sets.setdefault(_NUMBER.sub("", path.name), []).append(open_shard(path))
    return [ShardSet(name, tuple(shards)) for name, shards in sets.items()]


def holds_shards(place: Path) -> bool:
    """Whether a place is a shard, or a folder with files that are called like shards."""
    if place.is_dir():
        return any(place.glob("*.bin"))
    return place.suffix == ".bin"


def of_split(sets: Sequence[ShardSet], split: str, place: Path) -> ShardSet:
    """The set of one split (train or val) by its name, or the only one. DataError where there is no telling."""
    named = [one for one in sets if split in one.name]
    if len(named or sets) == 1:
        return (named or list(sets))[0]
    names = ", ".join(one.name for one in sets)
    raise DataError(f"{place}: which of {names} is {split}? name one file, or give the folder's shards such names")


def tokenizer_beside(place: Path, model: Path | None = None) -> Tokenizer | None:
    """The tokenizer that is named, or the only .model beside the shards; None where there is none."""
    if model is None:
        folder = place if place.is_dir() else place.parent
        found = sorted(folder.glob("*.model"))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise RecipeError(f"{folder}: holds {len(found)} tokenizers ({names}); name one with --tokenizer")
        if not found:
            return None
        model = found[0]
    return Tokenizer.from_bytes(read(model), str(model))


def foreign(shard: Shard, position: int, tokenizer: Tokenizer) -> DataError:
    """The one line for a token that the tokenizer does not have."""
    return DataError(
        f"{shard.path}: token {int(shard.tokens[position])} at position {position:,} is not among the "
        f"{tokenizer.size:,} pieces of {tokenizer.name}; name the tokenizer that made these shards"
    )
