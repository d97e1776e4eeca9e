"""Text of your own: a file or a folder, plain or packed (.xz, .gz, .bz2, .zst), divided by bytes or by documents.

By bytes: the files in the order of their names are one text, and two ranges of it are training and held-out text; a
boundary may cut a document. By documents: a hash of the content decides each document's side, so that equal documents
never stand on both. A file is a document, or `separator` opens one wherever it occurs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from fairway.base.errors import DataError, RecipeError
from fairway.data import packed
from fairway.data.splits import Parts, share_of

_SHARD_MAGIC = (20240520).to_bytes(4, "little")


@dataclass(frozen=True)
class Spec:
    """Which part of the text is trained on, and which held out."""

    by: Literal["bytes", "documents"] = "bytes"
    train: tuple[int, int] | None = None  # [from, to) in bytes, with by = "bytes"; None: what valid leaves before it
    valid: tuple[int, int] | None = None  # [from, to) in bytes; None: the tail of valid_fraction
    valid_fraction: float = 0.1  # of the bytes at the end, or of the documents by hash
    separator: str = ""  # a document begins wherever this stands and keeps it; "" = a file is a document
    more: tuple[str, ...] = ()  # further files or folders, wholly training text, after the rest

    def __post_init__(self) -> None:
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"valid_fraction = {self.valid_fraction}: a number between 0 and 1 is needed")
        if self.by == "documents" and (self.train or self.valid):
            raise ValueError("train and valid are ranges of bytes: with by = 'documents' set valid_fraction instead")
        for name, part in (("train", self.train), ("valid", self.valid)):
            if part and not 0 <= part[0] < part[1]:
                raise ValueError(f"{name} = {list(part)}: a range [from, to) of bytes with 0 <= from < to is needed")
        if self.train and self.valid and self.train[0] < self.valid[1] and self.valid[0] < self.train[1]:
            raise ValueError(f"train = {list(self.train)} and valid = {list(self.valid)} overlap; set them apart")


def load(spec: Spec, path: str) -> Parts:
    """The text at `path`, divided. DataError names what is missing, empty or damaged."""
    if not path:
        raise RecipeError("data.path: not set; with data.source = text name a file or a folder of text")
    own = {file.resolve() for file in packed.files_of(Path(path))}
    for place in spec.more:
        if shared := own & {file.resolve() for file in packed.files_of(Path(place))}:
            raise RecipeError(
                f"data.source.more: {min(shared)} is part of data.path too, where some of it is held out; leave it out"
            )
    texts = list(_texts(Path(path)))
    more = tuple(
        part for place in spec.more for text in _texts(Path(place)) for part in documents(text, spec.separator)
    )
    if spec.by == "documents":
        return _by_documents(spec, path, texts, more)
    return _by_bytes(spec, path, texts, more)


def documents(text: bytes, separator: str) -> list[bytes]:
    """The documents of one file, whose concatenation is the file."""
    starts = _starts(text, separator)
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True) if a < b]


def _by_documents(spec: Spec, path: str, texts: list[bytes], more: tuple[bytes, ...]) -> Parts:
    whole = [document for text in texts for document in documents(text, spec.separator)]
    valid = tuple(document for document in whole if share_of(document) < spec.valid_fraction)
    train = tuple(document for document in whole if share_of(document) >= spec.valid_fraction)
    if not train or not valid:
        raise DataError(
            f"{path}: {len(whole)} document(s), {len(valid)} of them held out by hash; "
            "both sides need one: set data.source.separator, valid_fraction, or by = bytes"
        )
    return Parts(train=train + more, valid=valid)


def _by_bytes(spec: Spec, path: str, texts: list[bytes], more: tuple[bytes, ...]) -> Parts:
    text = b"".join(texts)
    valid = spec.valid or (len(text) - max(1, int(spec.valid_fraction * len(text))), len(text))
    train = spec.train or (0, valid[0])
    for name, part in (("train", train), ("valid", valid)):
        if not 0 <= part[0] < part[1] <= len(text):
            raise DataError(
                f"{path}: {name} = {list(part)} is no part of its {len(text):,} bytes; set data.source.{name}"
            )
    if train[0] < valid[1] and valid[0] < train[1]:
        raise RecipeError(f"data.source: train = {list(train)} and valid = {list(valid)} overlap; set them apart")
    starts, position = set[int](), 0
    for part_text in texts:
        starts.update(position + start for start in _starts(part_text, spec.separator))
        position += len(part_text)
    return Parts(
        train=_range(text, sorted(starts), train) + more, valid=_range(text, sorted(starts), valid), cuts_documents=True
    )


def _range(text: bytes, starts: list[int], part: tuple[int, int]) -> tuple[bytes, ...]:
    cuts = [part[0], *(start for start in starts if part[0] < start < part[1]), part[1]]
    return tuple(text[a:b] for a, b in pairwise(cuts))


def _starts(text: bytes, separator: str) -> list[int]:
    starts, mark = [0], separator.encode()
    while mark and (found := text.find(mark, starts[-1] + 1)) >= 0:
        starts.append(found)
    return starts


def _texts(path: Path) -> Iterator[bytes]:
    """The content of each file that is not empty."""
    empty = True
    for file in packed.files_of(path):
        content = packed.read(file)
        if content.startswith(_SHARD_MAGIC):
            raise DataError(f"{file}: a shard of tokens, not text; use data.source = shards")
        if content:
            empty = False
            yield content
    if empty:
        raise DataError(f"{path}: no text in it; set data.path to a file or folder that holds some")
