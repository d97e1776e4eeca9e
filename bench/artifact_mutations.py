"""Damaged and forged artifacts, thousands of them, over all coders, with and without repair, and float weights too:
what does opening make of each?

    python bench/artifact_mutations.py [--count 10000] [--seed 0] [--limit 20]

Half of the cases damage an artifact as a bad disk would: an ArtifactError is right, an open file is wrong. The other
half alter a section or the header and set every checksum right again, or damage float weights, whose header is under no
checksum: then other weights are right too. Any other exception is wrong in both, and so is a case that takes more than
--limit seconds or 200 MB.
"""

import argparse
import hashlib
import json
import random
import resource
import signal
import struct
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
import torch

from fairway.artifact import Artifact, PackSpec, open_artifact, seal, write_weights
from fairway.artifact.container import PRELUDE
from fairway.artifact.squeeze import squeeze, unsqueeze
from fairway.base import slots
from fairway.base.errors import ArtifactError
from fairway.base.specs import build
from fairway.quant import Quantized
from fairway.quant.books import lloyd_max
from fairway.quant.forms import Form, Formed
from fairway.quant.repair import RepairSpec, low_rank

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "artifact-v1-plain.fw"
FLOAT = "float weights"
BOOK = lloyd_max(3)
REPAIRED = 3  # matrices with an addend, where there is repair
WITH_MORE = ("plain", "brotli")  # coders: the section is the same beside all of them, and context takes seconds
CODERS: tuple[Any, ...] = (*slots.kinds("fairway.artifact.coder"), {"kind": "brotli", "reorder": True})
MOST_MEGABYTES = 200.0
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 8, 9, 255, 256, 1 << 16, 1 << 31, 1 << 40, 1 << 70, 0.5, 1e300, float("nan"), "", "rans"),
    *("plain", "../rans", "x" * 1000, "\n\x1b[2J", True, None, [], {}, [[]] * 40, {"kind": "none"}),
)


@dataclass(frozen=True)
class Original:
    """A file, and what it opens to."""

    coder: str
    content: bytes
    digest: str


@dataclass(frozen=True)
class Case:
    """One mutation. honest: no checksum was set right again, so that no other weights may come out."""

    kind: str
    coder: str
    content: bytes
    digest: str
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


def digest(artifact: Artifact) -> str:
    """One hash of all weights."""
    found = hashlib.sha256()
    for name, value in artifact.tensors.items():
        found.update(f"{name} {value.shape}\n".encode())
        if isinstance(value, Quantized):
            found.update(bytes([value.bits]) + value.codes.tobytes() + value.scales.tobytes())
            if isinstance(value, Formed):
                found.update(f"{value.form}\n".encode())
            if (addend := value.repair) is not None:
                found.update(f"{addend.left.shape} {addend.right.shape} {addend.group}\n".encode())
                for part in (addend.left, addend.left_scale, addend.right, addend.right_scales):
                    found.update(part.tobytes())
        else:
            found.update(value.tobytes())
    return found.hexdigest()


def originals(folder: Path) -> list[Original]:
    """The golden artifact's tensors by each coder, some tables made compressible so that every path is taken; the same
    with low-rank addends, and with forms; and its model's weights as floats."""
    golden, made = open_artifact(GOLDEN), []
    tensors = dict(golden.tensors)
    for name, value in tensors.items():
        if isinstance(value, Quantized) and value.codes.shape[0] > 64:
            codes = value.codes.copy()
            codes[::2] = codes[0] // 4
            tensors[name] = Quantized(codes, value.scales, value.bits)
    for coder in CODERS:
        path = folder / "original.fw"
        spec = build(PackSpec, {"coder": coder})
        kinds = {str(coder): tensors}
        if coder in WITH_MORE:
            kinds[f"{coder}, repair"] = repaired(tensors)
            kinds[f"{coder}, forms"] = formed(tensors)
        for name, held in kinds.items():
            seal(path, held, golden.model_spec, golden.vocab, golden.tokenizer, golden.decoder, spec)
            made.append(Original(name, path.read_bytes(), digest(open_artifact(path))))
    path = folder / "original.safetensors"
    write_weights(path, golden.model(), golden.tokenizer, golden.decoder)
    return [*made, Original(FLOAT, path.read_bytes(), digest(open_artifact(path)))]


def repaired(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors, the first few matrices with an addend of noise, of different ranks and groups."""
    generator, found = torch.Generator().manual_seed(0), dict(tensors)
    matrices = [(name, value) for name, value in tensors.items() if isinstance(value, Quantized)][:REPAIRED]
    for rank, (name, value) in enumerate(matrices, start=1):
        noise = 0.01 * torch.randn(value.shape, generator=generator)
        found[name] = replace(value, repair=low_rank(noise, None, RepairSpec("lqer", rank=rank, group=16 * rank)))
    return found


def formed(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors, the first few matrices with a book, a rotation, and both."""
    found = dict(tensors)
    matrices = [(name, value) for name, value in tensors.items() if isinstance(value, Quantized)]
    for (name, value), form in zip(matrices, (Form(5, ()), Form(-1, BOOK), Form(1 << 31, BOOK)), strict=False):
        codes = np.clip(value.codes, -len(BOOK), len(BOOK)) if form.levels else value.codes
        found[name] = Formed(codes, value.scales, max(value.bits, 4), form=form)
    return found


def cases(made: list[Original], count: int, seed: int) -> Iterator[Case]:
    """`count` mutations, half with checksums set right; equal numbers of each kind and coder, about."""
    chance = random.Random(seed)
    for number in range(count):
        honest = number % 2 == 0
        table = DAMAGE if honest else FORGERY
        kind = list(table)[number // 2 % len(table)]
        fitting = [one for one in made if (one.coder == FLOAT) == (kind == FLOAT)]
        original = chance.choice(fitting)
        while (content := table[kind](chance, original.content)) == original.content:
            original = chance.choice(fitting)
        yield Case(kind, original.coder, content, original.digest, honest)


def run(cases_: Iterator[Case], folder: Path, limit: float = 20.0) -> dict[tuple[str, bool], Tally]:
    """Opens every case in this process. limit: seconds for one."""
    tallies: dict[tuple[str, bool], Tally] = {}
    for case in cases_:
        path = folder / ("case.safetensors" if case.coder == FLOAT else "case.fw")
        tally = tallies.setdefault((case.kind, case.honest), Tally())
        tally.count += 1
        path.write_bytes(case.content)
        held, start = peak(), time.process_time()
        try:
            with at_most(limit):
                same = digest(open_artifact(path)) == case.digest
            tally.same += same
            tally.other += not same
            if case.honest:  # every byte is under the sha256: even the same weights would be a checksum not looked at
                tally.wrong.append((case, "an altered file was opened"))
        except ArtifactError as error:
            tally.refused += 1
            if not str(error).isprintable():
                tally.wrong.append((case, f"a message that is no line: {str(error)[:300]!r}"))
        except Late:
            tally.wrong.append((case, f"more than {limit} s"))
        except Exception:
            tally.wrong.append((case, traceback.format_exc()))
        tally.seconds = max(tally.seconds, time.process_time() - start)
        tally.megabytes = max(tally.megabytes, peak() - held)
        if peak() - held > MOST_MEGABYTES:
            tally.wrong.append((case, f"{peak() - held:.0f} MB"))
    return tallies


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises Late where the block takes longer: seconds of this process, so that a busy machine is no wrong file."""

    def late(*_: object) -> None:
        raise Late

    handler = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def peak() -> float:
    """MB of memory held at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# Damage


def flip(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


def altered(chance: random.Random, content: bytes) -> bytes:
    """One to three damages of the kinds that disks and editors do."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        near = chance.random() < 0.4  # the beginning holds a section's model and states
        place = chance.randrange(min(len(content), 40 if near else len(content)) + 1)
        size = min(chance.choice((1, 1, 2, 4, 30, 200)), len(content) - place)
        piece, other = content[place : place + size], chance.randrange(len(content) + 1)
        new = chance.choice(
            (
                bytes(value ^ (1 << chance.randrange(8)) for value in piece[:1]) + piece[1:],
                *(chance.randbytes(size), bytes(size), b"\xff" * size, b"", piece + piece),
                *(piece + chance.randbytes(chance.randrange(1, 9)), content[other : other + size]),
                struct.pack("<h", chance.choice((-(1 << 15), (1 << 15) - 1, 0, 1, -1, 255))),
            )
        )
        content = content[:place] + new + content[place + size :]
    return content


# Forgery: checksums set right again


def parts(content: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """A file's header and its sections."""
    start = PRELUDE + int.from_bytes(content[PRELUDE - 8 : PRELUDE - 4], "little")
    table, blobs = json.loads(unsqueeze(content[PRELUDE:start], 1 << 22)), []
    for _, stored, _ in table["sections"]:
        blobs.append(content[start : start + stored])
        start += stored
    return table, blobs


def whole(content: bytes, table: dict[str, Any], blobs: list[bytes], follow: bool = True) -> bytes:
    """The file with that header and those sections. follow: lengths and crc32s are those of the sections."""
    if follow:
        table["sections"] = [
            [row[0], len(blob), zlib.crc32(blob)] for row, blob in zip(table["sections"], blobs, strict=True)
        ]
    header = squeeze(json.dumps(table).encode())
    prelude = content[:8] + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little")
    body = b"".join([prelude, header, *blobs])
    return body + hashlib.sha256(body).digest()


def forged_codes(chance: random.Random, content: bytes) -> bytes:
    """A group's bytes."""
    table, blobs = parts(content)
    place = chance.choice([i for i, row in enumerate(table["sections"]) if row[0].startswith("codes.")])
    blobs[place] = chance.choice((altered, altered, flip, cut))(chance, blobs[place] or b"\0")
    return whole(content, table, blobs)


def forged_other(chance: random.Random, content: bytes) -> bytes:
    """Any section's bytes; sections exchanged."""
    table, blobs = parts(content)
    place, other = chance.randrange(len(blobs)), chance.randrange(len(blobs))
    if chance.random() < 0.3:
        blobs[place], blobs[other] = blobs[other], blobs[place]
    else:
        blobs[place] = altered(chance, blobs[place])
    return whole(content, table, blobs)


def forged_header(chance: random.Random, content: bytes) -> bytes:
    """A value anywhere in the header."""
    table, blobs = parts(content)
    for _ in range(chance.choice((1, 1, 2))):
        node: Any = table
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = chance.choice(keys)
            if not isinstance(node[key], (dict, list)) or not node[key] or chance.random() < 0.05:
                break
            node = node[key]
        old = node[key]
        numbers = [old + 1, old - 1, old * 2] if isinstance(old, int) else []
        node[key] = chance.choice((*VALUES, *numbers * 5))
    try:
        return whole(content, table, blobs, follow=False)
    except (ValueError, RecursionError):
        return content


def forged_repair(chance: random.Random, content: bytes) -> bytes:
    """The addends' bytes, or what the header says of them; the file as it is where it has none."""
    table, blobs = parts(content)
    names = [row[0] for row in table["sections"]]
    if "repair" not in names:
        return content
    place = names.index("repair")
    if chance.random() < 0.6:  # beneath the squeezing, else most are refused before a code is looked at
        raw = unsqueeze(blobs[place], 1 << 20)
        blobs[place] = squeeze(chance.choice((altered, flip, cut))(chance, raw))
    else:
        blobs[place] = altered(chance, blobs[place])
    if chance.random() < 0.4:
        row = chance.choice(table["repair"])
        row[chance.randrange(len(row))] = chance.choice((*VALUES, *(1, 2, 3, 16, 64, 1 << 16) * 4))
    try:
        return whole(content, table, blobs)
    except (ValueError, RecursionError):
        return content


def forged_forms(chance: random.Random, content: bytes) -> bytes:
    """What the header says of a form; the file as it is where it has none."""
    table, blobs = parts(content)
    if not (rows := table.get("forms")):
        return content
    row = chance.choice(rows)
    place = chance.randrange(3)
    if place == 2 and row[2] and chance.random() < 0.7:
        level = chance.randrange(len(row[2]))
        row[2][level] = chance.choice((*VALUES, *(row[2][level] * factor for factor in (0.5, 2.0, -1.0, 1.1))))
    elif place == 2:
        row[2] = chance.choice((row[2][:-1], row[2][::-1], row[2] * 2, list(BOOK), [*row[2], 2.5], []))
    else:
        others = [name for group in table["groups"] for name, *_ in group["tensors"]] if place == 0 else [0, 1, 2, 77]
        row[place] = chance.choice((*VALUES, *others * 3))
    try:
        return whole(content, table, blobs)
    except (ValueError, RecursionError):
        return content


def damaged_weights(chance: random.Random, content: bytes) -> bytes:
    """Float weights: a bit or more, half of them in the header."""
    if chance.random() < 0.5:
        return chance.choice((flip, cut, altered))(chance, content)
    end = 8 + int.from_bytes(content[:8], "little")
    return flip(chance, content[:end]) + content[end:]


def forged_coder(chance: random.Random, content: bytes) -> bytes:
    """A file said to be of another coder."""
    table, blobs = parts(content)
    table["coder"] = chance.choice([name for name in CODERS if isinstance(name, str) and name != table["coder"]])
    return whole(content, table, blobs)


Mutation = Callable[[random.Random, bytes], bytes]
DAMAGE: dict[str, Mutation] = {"one bit": flip, "cut short": cut, "bytes": altered}
FORGERY: dict[str, Mutation] = {
    "codes": forged_codes,
    "codes, too": forged_codes,
    "another section": forged_other,
    "repair": forged_repair,
    "forms": forged_forms,
    FLOAT: damaged_weights,
    "header": forged_header,
    "coder": forged_coder,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--count", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--limit", type=float, default=20.0)
    given = options.parse_args()
    np.seterr(all="ignore")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tallies = run(cases(originals(Path(folder)), given.count, given.seed), Path(folder), given.limit)
    print(f"{'mutation':18} {'checksums':10} {'cases':>6} {'refused':>8} {'same':>6} {'other':>6} {'s':>6} {'MB':>5}")
    for (kind, honest), one in tallies.items():
        sums = "untouched" if honest else "set right"
        counts = f"{one.count:6} {one.refused:8} {one.same:6} {one.other:6} {one.seconds:6.2f} {one.megabytes:5.0f}"
        print(f"{kind:18} {sums:10} {counts}")
    wrong = [pair for one in tallies.values() for pair in one.wrong]
    for case, what in wrong[:10]:
        print(f"\nWRONG: {case.kind}, {case.coder}: {what}", file=sys.stderr)
    print(f"{len(wrong)} wrong; {time.perf_counter() - start:.0f} s, {peak():.0f} MB at most")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
