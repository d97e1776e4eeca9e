"""What one process does to one block: documents, tokens, and the account of both."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fairway.base.errors import DataError
from fairway.data.building.encoding import Encoder
from fairway.data.building.listing import shown
from fairway.data.building.reading import Block, Segment, too_long
from fairway.data.building.sidecar import BYTES, COLUMNS, Rows
from fairway.data.building.spec import BuildSpec
from fairway.data.sources.text import documents
from fairway.data.splits import Uint16, key_of
from fairway.data.tokens import _first_difference as first_difference
from fairway.data.tokens import check_bytes

_REPLACEMENT = "\ufffd".encode()


@dataclass(frozen=True)
class Loss:
    """Where a document first comes back other than it was. turn: of its file or block, in a part of a build."""

    turn: int
    place: str
    byte: int
    was: str
    comes_back: str

    def __str__(self) -> str:
        return f"{self.place}, byte {self.byte:,} of it: {self.was} comes back as {self.comes_back}"


@dataclass(frozen=True)
class Counts:
    """What a build counts. Bytes are those of the source's documents, before anything is replaced or lost."""

    documents: int = 0
    bytes: int = 0
    empty: int = 0  # documents without a byte: left out
    invalid: int = 0  # documents with bytes that are no UTF-8
    replaced: int = 0  # U+FFFD that were put in their place
    lost: int = 0  # documents that do not come back from their tokens
    repeated: int = 0  # training documents that stand in the held-out text too

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = vars(self), vars(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True, eq=False)
class Encoded:
    """A block's documents. tokens: (N,) uint16, BOS + tokens of each; rows: one for each document, `start` counted from
    the block's beginning; loss: the first, or None."""

    number: int
    digest: str
    read: int
    tokens: Uint16
    rows: Rows
    counts: Counts
    loss: Loss | None


def encode_block(block: Block, encoder: Encoder, spec: BuildSpec, by_files: bool = False) -> Encoded:
    """by_files: whether parts divide the files among them, or the blocks. DataError for what the spec refuses, or
    a line that is no JSON object with a text."""
    bos, parts, texts = np.array([encoder.tokenizer.bos], dtype=np.uint16), list[Uint16](), list[bytes]()
    rows, loss, start, empty, invalid, replaced, lost = list[tuple[int, ...]](), None, 0, 0, 0, 0, 0
    for segment in block.segments:
        turn = segment.file if by_files else block.number
        for place, original in originals(segment, spec):
            if not original:
                empty += 1
                continue
            document = original if _is_utf8(original) else _replaced(segment, place, original, spec)
            if document is not original:
                invalid += 1
                replaced += document.count(_REPLACEMENT) - original.count(_REPLACEMENT)
            encoding = encoder.encode(document)
            if encoding.text != document:
                lost += 1
                loss = loss or _loss(turn, segment, place, document, encoding.text)
                if spec.lossy == "refuse":
                    raise DataError(
                        f"{encoder.tokenizer.name}: lossy on {loss}; "
                        "use --lossy report (the shards hold another text), or another tokenizer"
                    )
            key = int.from_bytes(key_of(original)[:8], "big")
            rows.append((start, len(original), len(encoding.text), key, turn))
            parts += [bos, encoding.tokens]
            texts.append(encoding.text)
            start += 1 + len(encoding.tokens)
    tokens = np.concatenate([np.zeros(0, np.uint16), *parts])
    if len(tokens):
        check_bytes(tokens, encoder.tokenizer, b"".join(texts))  # of the piece table, which scores are divided by
    counts = Counts(len(rows), sum(row[BYTES] for row in rows), empty, invalid, replaced, lost)
    table = np.array(rows, dtype=np.uint64).reshape(-1, COLUMNS)
    return Encoded(block.number, block.digest, block.read, tokens, table, counts, loss)


def originals(segment: Segment, spec: BuildSpec) -> Iterator[tuple[str, bytes]]:
    """(where it stands in its file, the bytes) of each document; a line of JSON is refused or gives its text."""
    if isinstance(segment.content, list):
        for row, text in enumerate(segment.content, segment.place):
            yield f"row {row:,}", text
    elif segment.lines:
        for number, line in enumerate(segment.content.removesuffix(b"\n").split(b"\n"), segment.place):
            if line.strip():
                yield f"line {number:,}", _text_of(line, f"{shown(segment.name)}: line {number:,}", spec)
    else:
        place = segment.place
        for document in documents(segment.content, spec.separator) or [b""]:
            if len(document) > spec.longest:
                raise too_long(segment.name, f"byte {place:,}", spec.longest)
            yield f"byte {place:,}", document
            place += len(document)


def _text_of(line: bytes, place: str, spec: BuildSpec) -> bytes:
    try:
        parsed = json.loads(line.decode("utf-8", "surrogateescape").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        why = str(error).split(":")[0].lower()
        raise DataError(f"{place}: no JSON ({why}); mend the line, or set --format text") from error
    if not isinstance(parsed, dict) or spec.text_key not in parsed:
        keys = ", ".join(map(shown, list(parsed)[:8])) if isinstance(parsed, dict) else type(parsed).__name__
        raise DataError(f"{place}: no key {spec.text_key!r}, only {keys or 'nothing'}; set --text-key")
    text = parsed[spec.text_key]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise DataError(f"{place}: {spec.text_key!r} holds no text but {shown(repr(text))[:40]}; set --text-key")
    try:
        return text.encode("utf-8", "surrogateescape")  # bytes that were no UTF-8 as they stood
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")  # halves of characters, written as escapes


def _is_utf8(document: bytes) -> bool:
    try:
        document.decode()
    except UnicodeDecodeError:
        return False
    return True


def _replaced(segment: Segment, place: str, document: bytes, spec: BuildSpec) -> bytes:
    """The document with U+FFFD for what is no UTF-8."""
    if spec.invalid == "refuse":
        try:
            document.decode()
        except UnicodeDecodeError as error:
            found = document[error.start : error.start + 4]
            raise DataError(
                f"{shown(segment.name)}: {place}: no UTF-8 at byte {error.start:,} of the document ({found!r}); "
                "set --invalid replace, or mend the text"
            ) from None
    return document.decode("utf-8", "replace").encode()


def _loss(turn: int, segment: Segment, place: str, document: bytes, text: bytes) -> Loss:
    at = first_difference(document, text)
    where = f"{shown(segment.name)}, {place}"
    return Loss(turn, where, at, repr(document[at : at + 12]), repr(text[at : at + 12]))
