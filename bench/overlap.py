"""What the search for shared documents costs: seconds, processor seconds, memory.

    python bench/overlap.py DATA [--processes 1,2] [--shards 2] [--shard-tokens 100000000]

DATA: a folder with wiki_more.bin.xz and wiki100.bin.xz. First 225 MB of Wikipedia, packed, are scanned for documents of
[90M, 95M) of another part of it, after 20 of these and 20 that are nearly the same were put behind them. Then shards of
random documents (as long as the challenge's, 1,240 tokens in the mean; short ones coincide by chance) are compared with
50,000 held-out ones, as every run does, beside the one look at each token that the check of the vocabulary takes.
"""

import argparse
import lzma
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fairway.data import Tokens
from fairway.data.overlap import shared_tokens
from fairway.data.sources.shards import open_shard, write_shard

MARK = "<doc "
BOS, PIECES = 1, 1024


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("data", type=Path)
    words.add_argument("--processes", default="1,2")
    words.add_argument("--shards", type=int, default=2)
    words.add_argument("--shard-tokens", type=int, default=100_000_000)
    asked = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text(asked.data, Path(folder), [int(part) for part in asked.processes.split(",")])
        tokens(Path(folder), asked.shards, asked.shard_tokens)


def text(data: Path, folder: Path, counts: list[int]) -> None:
    """The verb itself, in a process of its own."""
    valid = lzma.decompress((data / "wiki100.bin.xz").read_bytes())[90_000_000:95_000_000]
    (folder / "valid.txt").write_bytes(valid)
    documents = [MARK.encode() + part for part in valid.split(MARK.encode())[1:]]
    exact, near = documents[:20], [part.replace(b" the ", b" some ", 3) for part in documents[20:40]]
    planted = [*(part.replace(b"\n", b"\n\n").replace(b" a ", b" A ") for part in exact), *near]
    (folder / "planted.txt").write_bytes(b"".join(planted))
    for processes in counts:
        command = [
            sys.executable,
            "-m",
            "fairway",
            "data",
            "overlap",
            data / "wiki_more.bin.xz",
            folder / "planted.txt",
        ]
        command += [folder / "valid.txt", "--separator", MARK, "--workers", processes, "--examples", 0]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"text, {processes} process(es): {seconds:.1f} s, {processor:.1f} s of processors, start included; ", end=""
        )
        print(f"largest process {after.ru_maxrss / 1000:,.0f} MB")
    print(done.stdout)


def tokens(folder: Path, shards: int, shard_tokens: int) -> None:
    generator, size = np.random.default_rng(0), 1240
    made = [random_documents(generator, shard_tokens, size) for _ in range(shards)]
    valid = random_documents(generator, 50_000 * size, size)
    starts = np.flatnonzero(valid == BOS)
    leaked = valid[: starts[500]]
    made[0][-len(leaked) :] = leaked
    for number, part in enumerate(made):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", part)
    del made
    parts = tuple(open_shard(path).tokens for path in sorted(folder.glob("fineweb_train_*.bin")))
    started = time.process_time()
    highest = max(
        int(part[first : first + (1 << 22)].max()) for part in parts for first in range(0, len(part), 1 << 22)
    )
    look = time.process_time() - started
    assert highest < PIECES
    started = time.process_time()
    found = shared_tokens(Tokens(parts, "train", lambda: b""), Tokens.of(valid, "valid", b""), BOS)
    seconds, total = time.process_time() - started, shards * shard_tokens
    print(
        f"shards, {total:,} tokens: {seconds:.2f} s of the processor, {total / seconds / 1e6:,.0f} M tokens/s; ", end=""
    )
    print(f"the check of the vocabulary alone: {look:.2f} s")
    print(f"found {found.shared:,} of {found.documents:,} held-out documents; 500 were put there")
    print(
        f"memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:,.0f} MB, shards included"
    )


def random_documents(generator: np.random.Generator, count: int, size: int) -> np.ndarray:
    """count tokens in documents of geometric length, `size` tokens in the mean."""
    made = generator.integers(3, PIECES, count, dtype=np.uint16)
    made[generator.random(count, dtype=np.float32) < 1 / size] = BOS
    made[0] = BOS
    return made


if __name__ == "__main__":
    main()
