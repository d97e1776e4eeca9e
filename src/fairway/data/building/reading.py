"""A source as blocks of whole documents, read as a stream: what is held at once does not grow with the source.

A segment is a stretch of one file that holds whole documents; a block is a few segments of about a megabyte together,
the unit that is encoded by one process and after which a killed build goes on. Blocks are the same in every build of
the same source.
"""

import bz2
import gzip
import hashlib
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, BinaryIO

from fairway.base.errors import DataError
from fairway.data import packed
from fairway.data.building.listing import File, refuse_shard, shown, unreadable

BLOCK = 1 << 20  # bytes of text, from which on a block is closed; and the most that is read at once
_DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class Segment:
    """Whole documents of one file.

    content: bytes still to be cut (lines of JSON, or text), or documents; place: the number of its first line (from 1),
    its first byte or its first row, for messages.
    """

    file: int
    name: str
    lines: bool
    place: int
    content: bytes | list[bytes]
    read: int = 0  # bytes of the file as it lies that were read so far, for the progress

    @property
    def bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else sum(map(len, self.content))


@dataclass(frozen=True)
class Block:
    """segments: documents that are encoded together; digest: of all of the source up to the block's end."""

    number: int
    segments: tuple[Segment, ...]
    digest: str
    read: int


@dataclass
class Digest:
    """The hash of a source while it is read. Of one file it is the sha256 of its unpacked bytes (of Parquet: of its
    texts, one after another); of several, the sum modulo 2^256 of each one's sha256(number, sha256), so that parts that
    were read elsewhere can be added."""

    total: int = 0
    files: int = 0
    bytes: int = 0
    _number: int = -1
    _file: Any = field(default_factory=hashlib.sha256)

    def update(self, segment: Segment) -> None:
        if segment.file != self._number:
            self._close()
            self._number, self._file = segment.file, hashlib.sha256()
            self.files += 1
        for part in [segment.content] if isinstance(segment.content, bytes) else segment.content:
            self._file.update(part)
            self.bytes += len(part)

    @property
    def so_far(self) -> str:
        """What distinguishes two sources up to here."""
        return f"{self.total:x} {self._number} {self._file.hexdigest()}"

    def end(self) -> tuple[str, int]:
        """(the sha256 of the last file alone, the sum over all files)."""
        alone = self._file.hexdigest()
        self._close()
        return alone, self.total

    def _close(self) -> None:
        if self._number >= 0:
            one = hashlib.sha256(self._number.to_bytes(8, "little") + self._file.digest()).digest()
            self.total = (self.total + int.from_bytes(one, "big")) % (1 << 256)
        self._number = -1


def blocks(segments: Iterable[Segment], files: Sequence[File], digest: Digest) -> Iterator[Block]:
    """Segments in blocks of about BLOCK bytes; the digest is kept up to date on the way."""
    group, held, number = list[Segment](), 0, 0
    before = dict(zip((f.number for f in files), accumulate((f.bytes for f in files), initial=0), strict=False))
    for segment in segments:
        digest.update(segment)
        group.append(segment)
        held += segment.bytes + 64  # a million empty files are not one block
        if held >= BLOCK:
            yield Block(number, tuple(group), digest.so_far, before[segment.file] + segment.read)
            group, held, number = [], 0, number + 1
    if group:
        yield Block(number, tuple(group), digest.so_far, before[group[-1].file] + group[-1].read)


def segments_of(files: Sequence[File], separator: str, text_key: str, longest: int) -> Iterator[Segment]:
    """The segments of files. DataError, naming the file, where one is damaged, cut short, cannot be read, or holds a
    document of more than `longest` bytes."""
    for file in files:
        if file.kind == "parquet":
            from fairway.data.building.parquet import segments

            yield from segments(file, text_key)
        else:
            mark = b"\n" if file.kind == "jsonl" else separator.encode()
            yield from _cut(file, mark, longest)


def _cut(file: File, mark: bytes, longest: int) -> Iterator[Segment]:
    lines = file.kind == "jsonl"
    buffer, place, line, read, searched = bytearray(), 0, 1, 0, 0
    for chunk, read in _chunks(file):
        if not place and not buffer:
            refuse_shard(file.name, chunk)
        buffer += chunk
        cut = _last_cut(buffer, mark, lines, searched)
        searched = len(buffer)
        if cut:
            content = bytes(buffer[:cut])
            del buffer[:cut]
            yield Segment(file.number, file.name, lines, line if lines else place, content, read)
            place, searched = place + cut, len(buffer)
            line += content.count(b"\n") if lines else 0
        if len(buffer) > longest:
            raise too_long(file.name, f"line {line:,}" if lines else f"byte {place:,}", longest)
    if buffer or (not place and not lines):  # an empty file is an empty document
        yield Segment(file.number, file.name, lines, line if lines else place, bytes(buffer), read)


def too_long(name: str, place: str, longest: int) -> DataError:
    """The one line for a document that is not taken into memory."""
    return DataError(
        f"{shown(name)}: the document at {place} is longer than {longest:,} bytes; "
        "set --separator to what opens a document, or --longest higher (each takes up to 50 bytes of memory)"
    )


def _last_cut(buffer: bytearray, mark: bytes, lines: bool, searched: int) -> int:
    """The last place where the buffer may be cut between documents, 0 for none. Only what came after `searched` bytes
    is looked at. A cut is never made inside of another mark: "aa" opens documents at both of its places in "aaa"."""
    if lines:
        return buffer.rfind(b"\n", searched) + 1
    if not mark:
        return 0
    cut = buffer.rfind(mark, max(1, searched - len(mark) + 1))
    while cut > 0 and (inside := buffer.rfind(mark, max(1, cut - len(mark) + 1), cut + len(mark) - 1)) > 0:
        cut = inside
    return max(cut, 0)


def _chunks(file: File) -> Iterator[tuple[bytes, int]]:
    """(unpacked bytes, how much of the file as it lies has been read) of one file, a megabyte at a time."""
    try:
        with _opened(file) as (raw, unpacked):
            while chunk := unpacked.read(BLOCK):
                yield chunk, raw.tell() if raw is not None else 0
    except (DataError, MemoryError):
        raise
    except Exception as error:
        if not isinstance(error, _DAMAGE) and type(error).__name__ != "ZstdError":
            raise
        if isinstance(error, OSError) and error.errno:
            raise unreadable(file.path or file.name, error) from error
        why = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"{shown(file.path or '-')}: damaged or cut short ({why}); fetch or pack it again") from error


@contextmanager
def _opened(file: File) -> Iterator[tuple[BinaryIO | None, Any]]:
    """(what tells how far the file was read, what gives its unpacked bytes)."""
    if file.path is None:
        yield None, sys.stdin.buffer
        return
    with file.path.open("rb") as raw:
        unpacker = _UNPACKERS.get(file.path.suffix.lower())
        if unpacker is None:
            yield raw, raw
        else:
            with unpacker(raw) as unpacked:
                yield raw, unpacked


_UNPACKERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".xz": lzma.LZMAFile,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".zst": lambda raw: packed._zstd().ZstdFile(raw),
}
