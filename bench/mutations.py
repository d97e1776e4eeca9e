"""Damaged and forged files, thousands of them: what does decompressing make of each?

    python bench/mutations.py [--count 10000] [--seed 0] [--limit 20]

Half of the cases damage the compressed files and the artifact as a bad disk would. For those, the exact text or an
ArtifactError is right, another text is wrong. The other half set every checksum right again (those within the files,
and the artifact's hash in the compressed one): then another text is right too. Any other exception is wrong in both,
and so is a case that takes more than --limit seconds. The last line of the table gives the memory of the whole.
"""

import argparse
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fairway.artifact import PackSpec, open_artifact, seal
from fairway.artifact.squeeze import squeeze, unsqueeze
from fairway.base.errors import ArtifactError
from fairway.base.specs import build, to_plain
from fairway.score import ScoreSpec
from fairway.score.codec import decompress, encode_part, format
from fairway.score.codec.files import assemble
from fairway.score.codec.format import Block, Part, Segment

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "artifact-v1-brotli.fw"
TEXT = b"A lane begins without context.\r\nThe quick brown fox \xf0\x9f\xa6\x8a\x00\xff jumps: 1, 2, 3.\n" * 4
ADAPT = {"kind": "ttt", "chunk": 48, "epochs": 2, "batch": 2, "micro_batch": 2, "lr": 0.01}
SLOT = {"kind": "slot", "steps": 2}
# What a forger would write where a number stands.
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    63,
    64,
    127,
    128,
    255,
    256,
    1 << 12,
    1 << 16,
    1 << 20,
    1 << 26,
    1 << 31,
    1 << 40,
    (1 << 63) - 1,
)
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 17, 1000, 1 << 20, 1 << 31, 1 << 40, 1 << 70, 0.0, -0.5, 0.5, 1e-300, 5e-324, 1e300, 1e999, -1e999),
    *(float("nan"), "", "none", "ttt", "plain", "\ud800", "x" * 1000, "\n\x1b[2J", True, None, [], {}, [[]] * 40),
    *({"kind": "none"}, {"kind": "ttt"}, {"kind": "slot"}, {"kind": "sliding"}, {"kind": "../ttt"}, {"kind": 7}),
)


@dataclass(frozen=True)
class Original:
    """A compressed file, its text, and how long it is in the table's words."""

    name: str
    content: bytes
    text: bytes


@dataclass(frozen=True)
class Case:
    """One mutation. honest: no checksum was set right again, so that no other text may come out."""

    kind: str
    artifact: bytes
    content: bytes
    text: bytes
    honest: bool


@dataclass
class Tally:
    """What the cases of one kind came to. wrong: (case, what happened) of each that must not be."""

    count: int = 0
    refused: int = 0
    same: int = 0
    other: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0
    wrong: list[tuple[Case, str]] = field(default_factory=list)


class Late(BaseException):
    """A case takes too long. No Exception: nothing on the way may take it for its own."""


def tiny_artifact(path: Path) -> None:
    """The golden artifact's tensors (width 8, 2 layers, context 16) in a file that adapts."""
    golden = open_artifact(GOLDEN)
    score = to_plain(build(ScoreSpec, {"result": "adapted", "windows": "rolling", "adapt": ADAPT}))
    seal(path, golden.tensors, golden.model_spec, golden.vocab, golden.tokenizer, {"score": score}, PackSpec())


def originals(path: Path) -> list[Original]:
    """Files that have all there is in one: segments, parts, lanes, blocks, updates, windows with context, no text."""
    artifact = open_artifact(path)
    tokens = artifact.tokenizer.encode_exactly(TEXT)
    row = np.concatenate([[artifact.tokenizer.bos], tokens]).astype(np.uint16)
    base = build(ScoreSpec, {"windows": "rolling", "lanes": 2})
    ways = {
        "rolling": (base, "sliding"),
        "sliding, slot": (build(ScoreSpec, {"result": "adapted", "adapt": SLOT, "windows": SLIDING}), "adapted"),
        "adapted": (replace(base, result="adapted", adapt=build(ScoreSpec, {"adapt": ADAPT}).adapt), "adapted"),
    }
    made = []
    for name, (spec, stage) in ways.items():
        segments, parts = [], []
        for _ in range(1 if stage == "adapted" else 2):
            encoded = [encode_part(artifact, row, spec, stage, 60)] * (1 if stage == "adapted" else 2)
            # A rounding that any decoder finds for itself: what no text here has would not be tried otherwise.
            near = [_with_rounding(artifact, one.part, spec, stage) for one in encoded]
            parts += [replace(one, part=part) for one, part in zip(encoded, near, strict=True)]
            segments.append(Segment(len(TEXT) * len(encoded), tuple(near)))
        coded = assemble(artifact, segments, parts, spec, stage)
        made.append(Original(name, coded.content, TEXT * len(parts)))
    made.append(Original("empty", assemble(artifact, [], [], base, "sliding").content, b""))
    return made


SLIDING = {"kind": "sliding", "stride": 8}


def _with_rounding(artifact: Any, part: Part, spec: ScoreSpec, stage: str) -> Part:
    """The part with two roundings listed, as a decoder computes them."""
    from fairway.score.codec import part as module

    seen: dict[int, Any] = {}
    real = module.exact.grid
    try:
        module.exact.grid = lambda logits, temperature: seen.setdefault(len(seen), real(logits, temperature))
        module.decode_part(artifact, replace(part, lanes=part.lanes), spec, stage, "own")
    finally:
        module.exact.grid = real
    first = seen[0]  # of the first step: position 0 of the first lane
    listed = tuple((0, symbol, int(first[0, symbol])) for symbol in (3, 200))
    return replace(part, blocks=(replace(part.blocks[0], near=listed), *part.blocks[1:]))


def cases(artifact: bytes, made: list[Original], count: int, seed: int) -> Iterator[Case]:
    """`count` mutations, half with checksums set right; equal numbers of each kind, about."""
    chance = random.Random(seed)
    kinds = [(kind, honest) for honest, table in ((True, DAMAGE), (False, FORGERY)) for kind in table]
    honest_kinds, forged_kinds = ([k for k in kinds if k[1] is honest] for honest in (True, False))
    for number in range(count):
        group = honest_kinds if number % 2 == 0 else forged_kinds
        kind, honest = group[number // 2 % len(group)]
        original = chance.choice(made)
        while True:
            pair = (DAMAGE if honest else FORGERY)[kind](chance, artifact, original.content)
            if pair != (artifact, original.content):
                break
            original = chance.choice(made)
        yield Case(kind, *pair, original.text, honest)


def run(cases_: Iterator[Case], folder: Path, limit: float = 20.0) -> dict[tuple[str, bool], Tally]:
    """Decodes every case in this process. limit: seconds for one."""
    tallies: dict[tuple[str, bool], Tally] = {}
    path, before, opened = folder / "case.fw", b"", None
    for case in cases_:
        tally = tallies.setdefault((case.kind, case.honest), Tally())
        tally.count += 1
        held, start = peak(), time.perf_counter()
        try:
            with at_most(limit):
                if case.artifact != before:
                    before, opened = b"", None
                    path.write_bytes(case.artifact)
                    opened, before = open_artifact(path), case.artifact
                text = decompress(opened, case.content, "case.fwc")
            if text == case.text:
                tally.same += 1
            else:
                tally.other += 1
                if case.honest:
                    tally.wrong.append((case, "another text was accepted"))
        except ArtifactError as error:
            tally.refused += 1
            if not str(error).isprintable():
                tally.wrong.append((case, f"a message that is no line: {str(error)[:300]!r}"))
        except Late:
            tally.wrong.append((case, f"more than {limit} s"))
        except Exception:
            tally.wrong.append((case, traceback.format_exc()))
        tally.seconds = max(tally.seconds, time.perf_counter() - start)
        tally.megabytes = max(tally.megabytes, peak() - held)
    return tallies


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises Late where the block takes longer."""

    def late(*_: object) -> None:
        raise Late

    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def peak() -> float:
    """MB of memory held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# Damage to bytes


def altered(chance: random.Random, content: bytes) -> bytes:
    """One to three damages of the kinds that disks, lines and editors do."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place = (
            chance.randrange(len(content) + 1) if chance.random() < 0.7 else chance.randrange(min(len(content), 64) + 1)
        )
        size = min(chance.choice((1, 1, 2, 4, 8, 30, 200)), len(content) - place)
        piece = content[place : place + size]
        other = chance.randrange(len(content) + 1)
        new = chance.choice(
            (
                bytes(value ^ (1 << chance.randrange(8)) for value in piece[:1]) + piece[1:],
                chance.randbytes(size),
                bytes(size),
                b"\xff" * size,
                b"",
                piece + piece,
                piece + chance.randbytes(chance.randrange(1, 9)),
                content[other : other + size],
            )
        )
        content = content[:place] + new + content[place + size :]
        if chance.random() < 0.1:
            content = content[: chance.randrange(len(content) + 1)]
    return content


MOST = {"block": 1 << 12}

Mutation = Callable[[random.Random, bytes, bytes], tuple[bytes, bytes]]
"""(chance, artifact, compressed file) -> the same two, one of them changed (or, by chance, not)."""


def flip(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


DAMAGE: dict[str, Mutation] = {
    "file: one bit": lambda chance, artifact, content: (artifact, flip(chance, content)),
    "file: cut short": lambda chance, artifact, content: (artifact, cut(chance, content)),
    "file: bytes": lambda chance, artifact, content: (artifact, altered(chance, content)),
    "artifact: one bit": lambda chance, artifact, content: (flip(chance, artifact), content),
    "artifact: bytes": lambda chance, artifact, content: (altered(chance, artifact), content),
}


# Forgery: the compressed file


def words(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    return artifact, _with_part(chance, content, lambda part: replace(part, words=altered(chance, part.words)))


def numbers(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """A number or two of a segment's header; the other numbers sometimes follow, so that it is sound in itself."""
    header, segments = _taken(content)
    follow = chance.random() < 0.5

    def other(value: int, most: int = 1 << 63) -> int:
        drawn = chance.choice((chance.choice(NUMBERS), value + 1, value - 1, value * 2, value // 2))
        return max(0, min(drawn, most))

    def change(part: Part) -> Part:
        names = chance.sample(["targets", "whole", "lanes", "block"], chance.choice((1, 1, 2)))
        # At most one block is decoded in vain: of 4,096 tokens here, so that no case may take long.
        new = replace(part, **{name: other(getattr(part, name), MOST.get(name, 1 << 62)) for name in names})
        wanted = -(-new.targets // max(new.block, 1))
        if follow and wanted < 5000:
            new = replace(new, blocks=((*new.blocks, *[Block(0, new.blocks[0].state)] * wanted)[:wanted]))
        return replace(new, whole=max(new.whole, new.targets))

    segments = _changed(chance, segments, change)
    if segments and (follow or chance.random() < 0.3):
        place = chance.randrange(len(segments))
        most = max(sum(part.targets for part in segments[place].parts), other(segments[place].text_bytes))
        segments[place] = replace(segments[place], text_bytes=min(most, 1 << 62))
        header = replace(header, text_bytes=sum(segment.text_bytes for segment in segments))
    return artifact, format.pack(header, segments)


def blocks(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """A block's checksum, state or roundings; blocks and parts that are missing, double, or in another order."""

    def change(part: Part) -> Part:
        listed = list(part.blocks)
        place = chance.randrange(len(listed))
        block = listed[place]
        near = (chance.choice(NUMBERS[:9]), chance.choice(NUMBERS[:14]), chance.choice((0, 1, -1, 40, -(1 << 40))))
        listed[place] = chance.choice(
            (
                replace(block, tokens=chance.getrandbits(32)),
                replace(block, state=chance.randbytes(len(block.state))),
                replace(block, near=(*block.near, near)),
                replace(block, near=tuple((p, s, z + chance.choice((-2, -1, 1, 2))) for p, s, z in block.near)),
                replace(block, near=tuple((p + 1, s, z) for p, s, z in block.near)),
                replace(block, near=()),
            )
        )
        if chance.random() < 0.2:
            listed = chance.choice((listed[:-1], [*listed, listed[0]], listed[::-1]))
        return replace(part, blocks=tuple(listed))

    if chance.random() < 0.8:
        return artifact, _with_part(chance, content, change)
    header, segments = _taken(content)
    segments = chance.choice((segments[:-1], segments + segments[:1], segments[::-1]))
    if segments:
        place, parts = chance.randrange(len(segments)), segments[0].parts
        segments[place] = replace(segments[place], parts=chance.choice((parts[::-1], parts[1:], parts * 2, parts)))
    header = replace(header, segments=len(segments), text_bytes=sum(segment.text_bytes for segment in segments))
    return artifact, format.pack(header, segments)


def header_values(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """A value of the header's JSON."""
    raw, rest = _blobs(content)
    table = json.loads(unsqueeze(raw[32:], 1 << 20))
    for _ in range(chance.choice((1, 1, 2))):
        if chance.random() < 0.5:
            names = ["context", "windows", "adapt", "temperature", "lanes", "exact", "result", "x"]
            held = table.get("settings")
            settings = dict(held) if isinstance(held, dict) else {}
            table["settings"] = _set(chance, settings, chance.choice(names))
        else:
            _set(chance, table, chance.choice([*table, "chunk", "machine", "wrote", "stage", "new"]))
    return artifact, _joined(raw[:32] + squeeze(json.dumps(table).encode()), rest)


def header_bytes(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """The header's JSON as bytes, before and after squeezing."""
    raw, rest = _blobs(content)
    if chance.random() < 0.3:
        depth = chance.choice((50, 300, 500, 900, 990, 5000))
        deep = (
            b'{"stage":"sliding","text_bytes":0,"segments":0,"settings":{"adapt":' + b"[" * depth + b"]" * depth + b"}}"
        )
        return artifact, _joined(raw[:32] + squeeze(deep), rest)
    plain = unsqueeze(raw[32:], 1 << 20)
    new = squeeze(altered(chance, plain)) if chance.random() < 0.6 else altered(chance, raw[32:])
    return artifact, _joined(raw[:32] + new, rest)


def segment_bytes(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """A segment's header as bytes."""
    raw, rest = _blobs(content)
    if len(rest) < 8:
        return artifact, _joined(raw, altered(chance, rest))
    size = int.from_bytes(rest[:4], "little")
    return artifact, _joined(raw, format._sized(altered(chance, rest[8 : 8 + size])) + rest[8 + size :])


# Forgery: the artifact. The compressed file names the forged one.


def sections(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """A section's bytes."""
    table, stored = _opened(artifact)
    name = chance.choice(list(stored))
    stored[name] = altered(chance, stored[name])
    return _renamed(_sealed(table, stored), content)


def contents(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """What a squeezed section holds: scales, float16 numbers, the tokenizer (of the same length, mostly)."""
    table, stored = _opened(artifact)
    name = chance.choice(("scales", "float16", "tokenizer"))
    raw = unsqueeze(stored[name], 1 << 25)
    for _ in range(chance.choice((1, 2, 8))):
        raw = flip(chance, raw)
    if chance.random() < 0.2:
        raw = altered(chance, raw)
    stored[name] = squeeze(raw)
    if name == "tokenizer":
        table["tokenizer"] = hashlib.sha256(raw).hexdigest()
    return _renamed(_sealed(table, stored), content)


def tables(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """A value of the artifact's header, the score's settings among them."""
    table, stored = _opened(artifact)
    part = chance.choice((table, table["model"], table["decoder"], table["decoder"]["score"]))
    _set(chance, part, chance.choice(list(part)), skip="sections")
    return _renamed(_sealed(table, stored), content)


def table_bytes(chance: random.Random, artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """The artifact's header as bytes."""
    size = int.from_bytes(artifact[8:12], "little")
    raw, rest = unsqueeze(artifact[16 : 16 + size], 1 << 22), artifact[16 + size : -32]
    return _renamed(_wrapped(squeeze(altered(chance, raw)), rest), content)


FORGERY: dict[str, Mutation] = {
    "file: words": words,
    "file: numbers of a segment": numbers,
    "file: blocks and parts": blocks,
    "file: values of the header": header_values,
    "file: bytes of the header": header_bytes,
    "file: bytes of a segment's header": segment_bytes,
    "artifact: sections": sections,
    "artifact: what they hold": contents,
    "artifact: values of the header": tables,
    "artifact: bytes of the header": table_bytes,
}


def _set(chance: random.Random, table: dict[str, Any], name: str, skip: str = "") -> dict[str, Any]:
    """A value of a table, or of one in it, is another one now."""
    held = table.get(name)
    if isinstance(held, dict) and held and chance.random() < 0.7:
        table[name] = _set(chance, dict(held), chance.choice(list(held)))
    elif name != skip:
        near = [held + 1, held - 1, held * 2] if isinstance(held, int) and not isinstance(held, bool) else []
        table[name] = chance.choice([*VALUES, *near, *near])
    return table


def _taken(content: bytes) -> tuple[format.Header, list[Segment]]:
    header, start = format.read_header(content, "own")
    return header, format.read_segments(content, start, header, "own")


def _with_part(chance: random.Random, content: bytes, change: Callable[[Part], Part]) -> bytes:
    header, segments = _taken(content)
    return format.pack(header, _changed(chance, segments, change))


def _changed(chance: random.Random, segments: list[Segment], change: Callable[[Part], Part]) -> list[Segment]:
    segments = list(segments)
    if segments:
        place = chance.randrange(len(segments))
        parts = list(segments[place].parts)
        at = chance.randrange(len(parts))
        parts[at] = change(parts[at])
        segments[place] = replace(segments[place], parts=tuple(parts))
    return segments


def _blobs(content: bytes) -> tuple[bytes, bytes]:
    """The header's blob, and all that follows it."""
    size = int.from_bytes(content[8:12], "little")
    return content[16 : 16 + size], content[16 + size :]


def _joined(raw: bytes, rest: bytes) -> bytes:
    return format.MAGIC + bytes([format.VERSION]) + format._sized(raw) + rest


def _opened(artifact: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The header's table, and the bytes of each section."""
    size = int.from_bytes(artifact[8:12], "little")
    table, start, stored = json.loads(unsqueeze(artifact[16 : 16 + size], 1 << 22)), 16 + size, {}
    for name, length, _ in table["sections"]:
        stored[name] = artifact[start : start + length]
        start += length
    return table, stored


def _sealed(table: dict[str, Any], stored: dict[str, bytes]) -> bytes:
    listed = [[name, len(blob), zlib.crc32(blob)] for name, blob in stored.items()]
    if isinstance(table.get("sections"), list):
        table = {**table, "sections": listed}
    return _wrapped(squeeze(json.dumps(table).encode()), b"".join(stored.values()))


def _wrapped(header: bytes, rest: bytes) -> bytes:
    prelude = b"FAIRWAY\x01" + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little")
    content = prelude + header + rest
    return content + hashlib.sha256(content).digest()


def _renamed(artifact: bytes, content: bytes) -> tuple[bytes, bytes]:
    """The compressed file names this artifact."""
    raw, rest = _blobs(content)
    return artifact, _joined(hashlib.sha256(artifact).digest() + raw[32:], rest)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--limit", type=float, default=20.0, help="seconds for one case")
    given = options.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_artifact(folder / "tiny.fw")
        made = originals(folder / "tiny.fw")
        drawn = cases((folder / "tiny.fw").read_bytes(), made, given.count, given.seed)
        tallies = run(drawn, folder, given.limit)
    print(f"{'kind':36}{'count':>7}{'refused':>9}{'same':>7}{'other':>7}{'wrong':>7}{'worst s':>9}{'more MB':>9}")
    for (kind, honest), tally in sorted(tallies.items(), key=lambda item: not item[0][1]):
        figures = f"{tally.count:7}{tally.refused:9}{tally.same:7}{tally.other:7}{len(tally.wrong):7}"
        remark = "" if honest else "  checksums right"
        print(f"{kind:36}{figures}{tally.seconds:9.2f}{tally.megabytes:9.0f}{remark}")
    wrong = [(kind, *one) for (kind, _), tally in tallies.items() for one in tally.wrong]
    print(
        f"{given.count} cases, seed {given.seed}: {len(wrong)} wrong; {time.perf_counter() - start:.0f} s, "
        f"peak memory {peak():.0f} MB"
    )
    for kind, _, what in wrong[:20]:
        print(f"--- {kind}\n{what}", file=sys.stderr)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
