"""Opening text: a spec and a split give a corpus. Only here is it decided which text may be trained on."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fairway.base import slots
from fairway.base.errors import DataError, HonestyError, RecipeError
from fairway.base.specs import choice
from fairway.data import splits
from fairway.data.splits import Parts, Shard, Split
from fairway.data.tokenizer import Tokenizer, TokenizerSpec, build, given


@dataclass(frozen=True)
class DataSpec:
    """Where text comes from, how it becomes tokens, and what is held out."""

    source: Any = choice("fairway.data.sources", "python_docs")
    path: str = ""  # file or folder of the source; python_docs needs none
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    lossy: Literal["refuse", "score_decoded"] = "refuse"  # of a tokenizer that cannot return the text exactly
    loader: Any = choice("fairway.data.loaders", "shuffled")  # the order of training windows
    ahead: int = 2  # training batches prepared in the background; 0: none
    held_out: Literal["valid", "dev"] = "valid"  # what the run is scored on; dev is left out of training only then
    # The share of held-out documents that may stand in the training text too. None: 0 for text, 0.01 for shards, whose
    # text repeats itself a little (FineWeb was cleaned of duplicates dump by dump); the challenge's leaks had 0.8.
    overlap_limit: float | None = None

    def __post_init__(self) -> None:
        if self.ahead < 0:
            raise ValueError(f"ahead = {self.ahead}: 0 (none) or more batches can be prepared")
        if not 0 <= (self.overlap_limit or 0) <= 1:
            raise ValueError(f"overlap_limit = {self.overlap_limit}: a share of documents, 0 to 1, is expected")


@dataclass(frozen=True, eq=False)
class Corpus:
    """One split of a source: documents of text, or shards of tokens.

    decoded: there is no original text, bytes are those of the decoded tokens.
    """

    split: Split
    documents: tuple[bytes, ...] = ()
    shards: tuple[Shard, ...] = ()

    @property
    def decoded(self) -> bool:
        return bool(self.shards)

    @cached_property
    def bytes(self) -> int:
        """Bytes of the text; of the stored tokens (2 each) where there are shards."""
        return sum(map(len, self.documents)) + sum(shard.tokens.nbytes for shard in self.shards)

    @cached_property
    def sha256(self) -> str:
        """Of the documents one after another, or of the shards' tokens."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document)
        for shard in self.shards:
            digest.update(shard.tokens.view(np.uint8).data)
        return digest.hexdigest()

    def describe(self) -> dict[str, object]:
        """Facts for the journal; shards of training text are not read through for their hash."""
        facts: dict[str, object] = {"split": self.split, "bytes": self.bytes, "documents": len(self.documents)}
        if self.shards:
            facts["shards"] = len(self.shards)
        if not (self.shards and self.split == "train"):
            facts["sha256"] = self.sha256
        return facts


def open_corpus(spec: DataSpec, split: Split) -> Corpus:
    """The text of one split. HonestyError where training and held-out text share a document, or dev was trained on."""
    if split not in ("train", "valid", "dev"):
        raise RecipeError(f"split {split!r}: choices: train, valid, dev")
    if split == "dev" and spec.held_out != "dev":
        raise HonestyError("dev: is trained on while data.held_out = valid; set data.held_out = dev before training")
    parts: Parts = slots.module_of(spec.source).load(spec.source, spec.path)
    corpus = _corpus(spec, split, parts)
    if not corpus.bytes:
        raise DataError(f"{spec.path or slots.kind_of(spec.source)}: no {split} text in it; give a larger corpus")
    return corpus


def build_tokenizer(spec: DataSpec, train: Corpus) -> Tokenizer:
    """The given tokenizer (where its path says, or under its name beside the data), or one trained on the training
    split. HonestyError for any other split."""
    return build(_placed(spec), train.split, train.documents)


def _placed(spec: DataSpec) -> TokenizerSpec:
    tokenizer = spec.tokenizer
    beside = Path(spec.path) / Path(tokenizer.model).name
    if tokenizer.model and not Path(tokenizer.model).exists() and beside.is_file():
        return replace(tokenizer, model=str(beside))
    return tokenizer


def _corpus(spec: DataSpec, split: Split, parts: Parts) -> Corpus:
    shared = splits.overlap(parts.train, parts.valid)
    if len(shared) > (spec.overlap_limit or 0) * len(parts.valid):
        raise HonestyError(
            f"{spec.path or slots.kind_of(spec.source)}: {len(shared)} held-out document(s) stand in the training text "
            f"too, the first is number {shared[0]}; take them out, or divide by documents"
        )
    for held_out in parts.valid_shards:
        for shard in parts.train_shards:
            if len(shard.tokens) == len(held_out.tokens) and (shard.tokens == held_out.tokens).all():
                raise HonestyError(f"{shard.path}: the same tokens as the held-out {held_out.path}; take one away")
    if split == "valid":
        return Corpus("valid", parts.valid, parts.valid_shards)
    if spec.held_out == "valid":
        return Corpus("train", parts.train, parts.train_shards)
    rest, dev = splits.divide_dev(parts.train, parts.cuts_documents)
    bos = given(_placed(spec)).bos if parts.train_shards and spec.tokenizer.model else 1
    rest_shards, dev_shards = splits.divide_dev_shards(parts.train_shards, bos)
    return Corpus("train", rest, rest_shards) if split == "train" else Corpus("dev", dev, dev_shards)
