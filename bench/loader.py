"""Tokens a second that each loader gives, alone, over memory-mapped shards: training must never wait for one.

    python bench/loader.py [--shards 4] [--tokens 25000000] [--batch 786432] [--context 2048] [--steps 40] [--train 0.6]

Shards of random tokens with a BOS every 800 tokens or so (FineWeb's documents) are written to a temporary folder and
read once before. start: seconds to the first batch (the documents are found, an epoch is drawn). alone: a batch,
the median of so many one after another. waited: a step that then works for `train` seconds elsewhere (a GPU's: 0.6 s
are 1.3 M tokens/s) asks for its batch; how long it waits, in the foreground and with two batches prepared ahead.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fairway.base import slots
from fairway.data import Batches, Tokens, batches
from fairway.data.prefetch import Ahead
from fairway.data.sources.shards import open_shard, write_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=25_000_000)
    parser.add_argument("--batch", type=int, default=786_432)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--train", type=float, default=0.6, help="seconds that a step works")
    options = parser.parse_args()
    table = Table("loader", "start s", "alone tokens/s", "waited ms a step", "in the background")
    with tempfile.TemporaryDirectory() as folder:
        text = shards(Path(folder), options.shards, options.tokens)
        for kind in slots.kinds("fairway.data.loaders"):
            began = time.perf_counter()
            made = batches(
                text, slots.technique("fairway.data.loaders", kind).Spec(), options.batch, options.context, 1
            )
            made.batch(0)
            start = time.perf_counter() - began
            rate = options.batch / waited(made, options.steps, 0)
            plain = waited(made, options.steps // 4, options.train)
            with Ahead(made, 2) as ahead:
                background = waited(ahead, options.steps // 4, options.train)
            table.add_row(kind, f"{start:.2f}", f"{rate / 1e6:,.0f} M", f"{plain * 1e3:.2f}", f"{background * 1e3:.2f}")
    Console().print(table)


def shards(folder: Path, count: int, tokens: int) -> Tokens:
    """Random tokens of 1,024, memory-mapped."""
    chance, parts = np.random.default_rng(0), []
    for number in range(count):
        drawn = chance.integers(2, 1024, tokens, dtype=np.uint16)
        drawn[np.cumsum(chance.integers(100, 1500, tokens // 1500))] = 1
        write_shard(folder / f"fineweb_train_{number:06}.bin", drawn)
        parts.append(open_shard(folder / f"fineweb_train_{number:06}.bin").tokens)
        int(parts[-1].max())
    return Tokens(tuple(parts), "train", lambda: b"")


def waited(made: Batches | Ahead, steps: int, work: float) -> float:
    """Seconds that a step waits for its batch, the median, where it then works for so long elsewhere."""
    found = list[float]()
    for step in range(1, steps + 1):
        began = time.perf_counter()
        made.batch(step)
        found.append(time.perf_counter() - began)
        time.sleep(work)
    return statistics.median(found)


if __name__ == "__main__":
    main()
