"""Where a published data set lies: a repository, and what its files are called."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from fairway.base.errors import DataError, RecipeError
from fairway.data.fetching.places import Published

_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of what becomes a file's name here


@dataclass(frozen=True)
class Layout:
    """A repository of the hub and the patterns of its files; the values given here are the challenge's.

    In a pattern ** stands for any folders, * for any part of a name, {tokenizer} for the tokenizer's name and {vocab}
    for the number at the name's end.
    """

    name: str = "fineweb"
    repository: str = "willdepueoai/parameter-golf"
    kind: Literal["dataset", "model"] = "dataset"
    revision: str = "main"  # a branch, a tag or a commit
    train: str = "**/fineweb10B_{tokenizer}/fineweb_train_*.bin"
    valid: str = "**/fineweb10B_{tokenizer}/fineweb_val_*.bin"
    model: str = "**/fineweb_{vocab}_bpe.model"

    def choose(self, listing: Sequence[Published], tokenizer: str, shards: int) -> list[Published]:
        """The tokenizer, all held-out shards and the first `shards` training shards among the published files.

        RecipeError for a name that cannot be one, DataError where the repository does not hold what is asked for.
        """
        if not _SAFE.fullmatch(tokenizer):
            raise RecipeError(f"--tokenizer {tokenizer!r}: letters, digits, . _ and - are expected, such as sp1024")
        if shards < 0:
            raise RecipeError(f"--shards {shards}: a number of training shards is expected, 0 for none")
        model = self._found(listing, "model", tokenizer)
        if len(model) > 1:
            raise DataError(f"{self.repository}: {len(model)} files are named {self.model}; set model in a layout file")
        train = self._found(listing, "train", tokenizer) if shards else []
        if len(train) < shards:
            raise DataError(
                f"{self.repository}: {len(train)} training shards for {tokenizer}, not {shards}; "
                f"use --shards {len(train)}"
            )
        return [*model, *self._found(listing, "valid", tokenizer), *train[:shards]]

    def _found(
        self, listing: Sequence[Published], what: Literal["train", "valid", "model"], name: str
    ) -> list[Published]:
        pattern: str = getattr(self, what)
        vocab = re.search(r"\d+$", name)
        if "{vocab}" in pattern and not vocab:
            raise RecipeError(
                f"--tokenizer {name}: ends in no number, which {pattern} needs; set model in a layout file"
            )
        pattern = pattern.replace("{tokenizer}", name).replace("{vocab}", vocab[0] if vocab else "")
        matching = _expression(pattern)
        found = sorted((one for one in listing if matching.fullmatch(one.path)), key=lambda one: one.name)
        if not found:
            raise DataError(
                f"{self.repository}: no file named {pattern} among {len(listing):,}; "
                "look at the tokenizer's name, or describe the repository in a layout file"
            )
        if len({one.name for one in found}) < len(found):
            folders = sorted({str(PurePosixPath(one.path).parent) for one in found})
            raise DataError(
                f"{self.repository}: {pattern} is found in {', '.join(folders)}; set {what} in a layout file to one"
            )
        if bad := [one.name for one in found if not _SAFE.fullmatch(one.name)]:
            raise DataError(f"{self.repository}: {bad[0]!r} cannot be a file's name here; set {what} in a layout file")
        return found


def _expression(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression: **/ any folders or none, * any part of one name."""
    text = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
    return re.compile(text)
