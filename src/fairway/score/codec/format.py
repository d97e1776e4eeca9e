"""The compressed file: what stands in it, byte by byte, and every length checked before it is used.

    7 bytes  "FWCODED"     1 byte  version
    4 bytes  length of the header, 4 bytes its crc32 (little-endian)
    header   32 bytes sha256 of the artifact, then squeezed JSON: the settings that are not the artifact's own, sizes
    segments 4 bytes length and 4 bytes crc32 of a segment's header, that header, then the words of its parts

A segment's header holds, in unsigned varints (7 bits a byte, low ones first), the bytes of its text and its parts; a
part is what one range coder wrote, with the checksum of its words, and of each block a checksum of its tokens (with
adaptation also 8 bytes of the state's hash) and the roundings that another machine might take otherwise.
"""

import json
import zlib
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fairway.artifact.squeeze import squeeze, unsqueeze
from fairway.base.errors import ArtifactError

MAGIC, VERSION = b"FWCODED", 1
PRELUDE = len(MAGIC) + 1 + 8
MOST_HEADER = 1 << 20
MOST_BLOCK = 1 << 17  # tokens between two checks: what a forged file may have decoded in vain
MOST_CHUNK = 1 << 20  # the same where the file is one chunk of a proof
MOST_WORD = 200  # characters of a header's text, which messages repeat
DIGEST = 32
STATE = 8  # bytes of a state's hash


@dataclass(frozen=True)
class Header:
    """artifact: sha256 of the file that decodes; settings: the score's, where they are not the artifact's own; stage:
    what is decoded; text_bytes: of all segments; machine: of an adapted stream, the fingerprint of what learned."""

    artifact: str
    stage: str
    text_bytes: int
    segments: int
    settings: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    wrote: str = ""  # with what it was made, for the message of a refusal
    chunk: int | None = None  # the one chunk of an adapted stream that this is; it decodes from the state before it


@dataclass(frozen=True)
class Block:
    """tokens: crc32 of the block's tokens; state: where something is learned, 8 bytes of the hash of the
    state after it (of a chunk by itself: before it);
    near: (position, symbol, z) of logits near a rounding boundary, positions in ascending order."""

    tokens: int
    state: bytes = b""
    near: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Part:
    """What one range coder wrote. targets: tokens; whole: of the text of which these are the first (targets where it is
    all of it); lanes; block: tokens of a block."""

    targets: int
    whole: int
    lanes: int
    block: int
    words: bytes
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Segment:
    text_bytes: int
    parts: tuple[Part, ...] = field(default_factory=tuple)


def pack(header: Header, segments: list[Segment]) -> bytes:
    """The whole file."""
    plain = {key: value for key, value in header.__dict__.items() if key != "artifact" and value not in ("", {}, None)}
    raw = bytes.fromhex(header.artifact) + squeeze(json.dumps(plain, separators=(",", ":")).encode())
    pieces = [MAGIC + bytes([VERSION]), _sized(raw)]
    for segment in segments:
        writer = _Writer()
        writer.numbers(segment.text_bytes, len(segment.parts))
        for part in segment.parts:
            writer.numbers(part.targets, part.whole - part.targets, part.lanes, part.block, len(part.words))
            writer.raw(zlib.crc32(part.words).to_bytes(4, "little"))
            for block in part.blocks:
                writer.raw(block.tokens.to_bytes(4, "little") + block.state)
                writer.numbers(len(block.near))
                for position, symbol, z in block.near:
                    writer.numbers(position, symbol, 2 * z if z >= 0 else -2 * z - 1)
        pieces += [_sized(bytes(writer.content)), *(part.words for part in segment.parts)]
    return b"".join(pieces)


def read_header(content: bytes, name: str) -> tuple[Header, int]:
    """The header, and where the segments begin. ArtifactError for anything that `pack` did not write."""
    if content[: len(MAGIC)] != MAGIC:
        _fail(name, "magic", "this is no file that fairway compressed")
    if len(content) < PRELUDE:
        _fail(name, "header", "cut short; fetch it again")
    if content[len(MAGIC)] != VERSION:
        _fail(name, "version", f"{content[len(MAGIC)]} is not {VERSION}, which this fairway reads")
    raw, start = _blob(content, len(MAGIC) + 1, name, "header")
    try:
        header = Header(artifact=raw[:DIGEST].hex(), **json.loads(unsqueeze(raw[DIGEST:], MOST_HEADER)))
        sound = (
            all(_is_word(value) for value in (header.stage, header.machine, header.wrote))
            and isinstance(header.settings, dict)
            and all(type(value) is int and value >= 0 for value in (header.text_bytes, header.segments))
            and (header.chunk is None or (type(header.chunk) is int and header.chunk >= 0))
        )
    except (ValueError, TypeError, RecursionError) as error:
        _fail(name, "header", f"cannot be read ({shown(error)})")
    if not sound:
        _fail(name, "header", "values of the wrong type")
    return header, start


def read_segments(content: bytes, start: int, header: Header, name: str) -> list[Segment]:
    """All segments, their words checked."""
    segments = []
    for number in range(header.segments):
        where = f"segment {number}"
        raw, start = _blob(content, start, name, where)
        reader = _Reader(raw, name, where)
        adapted, alone = bool(header.machine), header.chunk is not None
        segment, sizes = _segment(reader, adapted or alone, MOST_CHUNK if alone else MOST_BLOCK)
        parts = []
        for part, (size, crc) in zip(segment.parts, sizes, strict=True):
            words = content[start : start + size]
            if len(words) != size:
                _fail(name, where, "its words are cut short; fetch the file again")
            if zlib.crc32(words) != crc:
                _fail(name, where, "its words are damaged (checksum); fetch the file again")
            parts.append(Part(part.targets, part.whole, part.lanes, part.block, words, part.blocks))
            start += size
        segments.append(Segment(segment.text_bytes, tuple(parts)))
    if start != len(content):
        _fail(name, "end", f"{len(content) - start:,} bytes follow the last segment")
    if sum(segment.text_bytes for segment in segments) != header.text_bytes:
        _fail(name, "header", "its bytes are not the sum of the segments'")
    return segments


def _segment(reader: "_Reader", adapted: bool, most: int) -> tuple[Segment, list[tuple[int, int]]]:
    text_bytes, count = reader.number(), reader.number()
    parts, sizes = [], []
    for _ in range(reader.at_most(count, len(reader.content))):
        targets, rest, lanes, block, words = (reader.number() for _ in range(5))
        # A target is a byte at least, or a document's BOS: more would not be this text, and would want any memory.
        if not (1 <= targets <= 2 * text_bytes + 16 and 1 <= lanes <= targets + rest and 1 <= block <= most):
            reader.fail(f"{targets:,} tokens in {lanes} lanes and blocks of {block}: impossible")
        if rest > 1 << 40:
            reader.fail(f"{targets + rest:,} tokens: impossible")
        sizes.append((words, int.from_bytes(reader.raw(4), "little")))
        blocks = []
        for _ in range(reader.at_most(-(-targets // block), len(reader.content))):
            crc, state = int.from_bytes(reader.raw(4), "little"), reader.raw(STATE) if adapted else b""
            near = []
            for _ in range(reader.at_most(reader.number(), len(reader.content))):
                position, symbol, z = (reader.number() for _ in range(3))
                near.append((position, symbol, z // 2 if z % 2 == 0 else -(z + 1) // 2))
            blocks.append(Block(crc, state, tuple(near)))
        parts.append(Part(targets, targets + rest, lanes, block, b"", tuple(blocks)))
    reader.end()
    return Segment(text_bytes, tuple(parts)), sizes


class _Writer:
    def __init__(self) -> None:
        self.content = bytearray()

    def numbers(self, *values: int) -> None:
        for value in values:
            while value >= 128:
                self.content.append(value & 127 | 128)
                value >>= 7
            self.content.append(value)

    def raw(self, value: bytes) -> None:
        self.content += value


class _Reader:
    def __init__(self, content: bytes, name: str, where: str) -> None:
        self.content, self.name, self.where, self.at = content, name, where, 0

    def number(self) -> int:
        value, shift = 0, 0
        while True:
            if self.at >= len(self.content) or shift > 56:
                self.fail("its header is cut short, or holds a number that is too large")
            byte = self.content[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def raw(self, size: int) -> bytes:
        value = self.content[self.at : self.at + size]
        if len(value) != size:
            self.fail("its header is cut short")
        self.at += size
        return value

    def at_most(self, count: int, most: int) -> int:
        if count > most:
            self.fail(f"announces {count:,} entries in {len(self.content):,} bytes")
        return count

    def end(self) -> None:
        if self.at != len(self.content):
            self.fail("its header is longer than what it lists")

    def fail(self, why: str) -> NoReturn:
        _fail(self.name, self.where, why)


def _sized(raw: bytes) -> bytes:
    return len(raw).to_bytes(4, "little") + zlib.crc32(raw).to_bytes(4, "little") + raw


def _blob(content: bytes, start: int, name: str, where: str) -> tuple[bytes, int]:
    size, crc = (int.from_bytes(content[start + 4 * i : start + 4 * i + 4], "little") for i in (0, 1))
    raw = content[start + 8 : start + 8 + size]
    if len(content) < start + 8 or len(raw) != size:
        _fail(name, where, "cut short; fetch the file again")
    if zlib.crc32(raw) != crc:
        _fail(name, where, "damaged (checksum); fetch the file again")
    return raw, start + 8 + size


def shown(error: Exception) -> str:
    """One line of what a complaint says of a file's content: no control characters of its reach a terminal."""
    text = str(error)[:300]
    return "".join(character if character.isprintable() else "?" for character in text)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST_WORD and value.isprintable()


def _fail(name: str, where: str, why: str) -> NoReturn:
    raise ArtifactError(f"{name}: {where}: {why}")
