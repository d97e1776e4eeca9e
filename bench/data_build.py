"""A large text to token shards: how fast beside SentencePiece's own batch encoder, how much memory, the same bytes?

    python bench/data_build.py TEXT --tokenizer MODEL --separator "<doc " [--kills 1] [--seed 0] [--workers 2]

speed   the whole text is built by --workers processes; SentencePiece encodes batches of its documents in as many
        processes, one thread each, in turns with it: a slice of the text by SentencePiece alone, then the build's
        next stretch while SentencePiece's processes are stopped, so that both meet the same neighbours
memory  the most that all processes of the build hold together: proportional and resident set sizes, read every 50 ms
same    the hashes of all files of builds by 1 process, by --workers, and of --kills builds that were killed (SIGKILL
        to the process group) at a random moment, each in a fresh folder, and called again

Rates are megabytes (10^6 bytes) of unpacked text per second and core, by the clock and by processor time.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path

import sentencepiece

from fairway.data.building.listing import files_of
from fairway.data.building.reading import segments_of
from fairway.data.sources.text import documents

SLICE = 3.0  # seconds of each turn


def documents_of(text: Path, separator: str, every: int) -> Iterator[bytes]:
    """The documents of every so-manieth segment: a sample of the whole text for SentencePiece."""
    segments = segments_of(files_of([str(text)]), separator, "text", 1 << 26)
    for number, segment in enumerate(segments):
        if number % every == 0 and isinstance(segment.content, bytes):
            yield from documents(segment.content, separator)


class Build:
    """`fairway data build` in a process group of its own, which can be stopped, continued and killed."""

    def __init__(self, arguments: argparse.Namespace, out: Path, workers: int) -> None:
        words = [sys.executable, "-m", "fairway", "data", "build", str(arguments.text), "-o", str(out), "--json"]
        words += ["--tokenizer", str(arguments.tokenizer), "--separator", arguments.separator, "--lossy", "report"]
        words += ["--workers", str(workers), "--valid-documents", "500", "--shard-tokens", "10000000"]
        self.running = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
        self.most = {"Pss": 0, "Rss": 0}
        self.watching = threading.Thread(target=self._watch, daemon=True)
        self.watching.start()

    def signal(self, which: signal.Signals) -> None:
        os.killpg(self.running.pid, which)

    def ended(self) -> bool:
        return self.running.poll() is not None

    def cpu_seconds(self) -> float:
        """Processor time of all its processes so far."""
        ticks = 0
        for stat in self._files("stat"):
            fields = stat.rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _files(self, name: str) -> Iterator[str]:
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    if os.getsid(int(folder.name)) == self.running.pid:
                        yield (folder / name).read_text()
                except (OSError, ProcessLookupError):
                    continue

    def _watch(self) -> None:
        while not self.ended():
            held = {"Pss": 0, "Rss": 0}
            for rollup in self._files("smaps_rollup"):
                for line in rollup.splitlines():
                    key = line.partition(":")[0]
                    if key in held:
                        held[key] += int(line.split()[1]) * 1024
            self.most = {key: max(self.most[key], held[key]) for key in held}
            time.sleep(0.05)


def encode_alone(model: bytes, batch: list[bytes], pipe: Connection) -> None:
    """SentencePiece in one process: a batch of about a megabyte at a time while it is told to."""
    processor, at, size = sentencepiece.SentencePieceProcessor(model_proto=model), 0, 0
    while (until := pipe.recv()) is not None:
        begun, cpu, done = time.monotonic(), time.process_time(), 0
        while time.monotonic() < until:
            part, size = [], 0
            while size < 1 << 20:
                part.append(batch[at % len(batch)])
                size += len(part[-1])
                at += 1
            processor.encode(part, num_threads=1)
            done += size
        pipe.send((done, time.monotonic() - begun, time.process_time() - cpu))


def speed(arguments: argparse.Namespace, out: Path) -> dict[str, float]:
    """The build and SentencePiece in turns; returns the rates."""
    sample = list(documents_of(arguments.text, arguments.separator, every=8))
    model = arguments.tokenizer.read_bytes()
    pipes, others = [], []
    for worker in range(arguments.workers):
        ours, theirs = Pipe()
        others.append(Process(target=encode_alone, args=(model, sample[worker :: arguments.workers], theirs)))
        others[-1].start()
        pipes.append(ours)
    build = Build(arguments, out, arguments.workers)
    ours_seconds, alone, cpu = 0.0, [0.0, 0.0, 0.0], 0.0
    while not build.ended():
        begun = time.monotonic()
        while not build.ended() and time.monotonic() - begun < SLICE:
            cpu = max(cpu, build.cpu_seconds())
            time.sleep(0.02)
        ours_seconds += time.monotonic() - begun
        if not build.ended():
            build.signal(signal.SIGSTOP)
            until = time.monotonic() + SLICE
            for pipe in pipes:
                pipe.send(until)
            for pipe in pipes:
                alone = [a + b for a, b in zip(alone, pipe.recv(), strict=True)]
            build.signal(signal.SIGCONT)
    for pipe, process in zip(pipes, others, strict=True):
        pipe.send(None)
        process.join()
    assert build.running.stdout is not None
    manifest = json.loads(build.running.stdout.read())
    megabytes = manifest["source"]["bytes"] / 1e6
    print(f"built {megabytes:.1f} MB, {manifest['splits']['train']['tokens']:,} training tokens", flush=True)
    return {
        "build, clock": megabytes / ours_seconds / arguments.workers,
        "sentencepiece, clock": alone[0] / 1e6 / alone[1],
        "build, processor time": megabytes / cpu,
        "sentencepiece, processor time": alone[0] / 1e6 / alone[2],
        "peak proportional MB": build.most["Pss"] / 1e6,
        "peak resident MB": build.most["Rss"] / 1e6,
        "build seconds": ours_seconds,
    }


def killed(arguments: argparse.Namespace, out: Path, longest: float, draw: random.Random) -> str:
    """A build in a fresh folder, killed at a random moment before `longest` seconds and called again until it ends;
    answers when and how much was whole, or "" where it had ended before it was killed."""
    build, moment, met = Build(arguments, out, arguments.workers), draw.uniform(0.5, longest), ""
    try:
        build.running.wait(moment)
    except subprocess.TimeoutExpired:
        build.signal(signal.SIGKILL)
        build.running.wait()
        met = f"after {moment:.1f} s, {len(list(out.glob('fineweb_*.bin')))} shards whole"
        build = Build(arguments, out, arguments.workers)
    assert build.running.wait() == 0
    return met


def same_after_kills(arguments: argparse.Namespace, place: Path, expected: dict[str, str], longest: float) -> None:
    """As many builds as kills are wanted, each killed once, each compared."""
    draw, met = random.Random(arguments.seed), 0
    while met < arguments.kills:
        out, begun = place / "kill", time.monotonic()
        when = killed(arguments, out, longest, draw)
        met += bool(when)
        longest = longest if when else time.monotonic() - begun  # the neighbours are quieter now
        verdict = "the same" if hashes(out) == expected else "DIFFERS"
        print(f"killed {met} of {arguments.kills}: {when or 'not: it had ended'}: {verdict}", flush=True)
        shutil.rmtree(out)


def hashes(out: Path) -> dict[str, str]:
    """Of every file that the build left, read from the disk."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.iterdir())
        if path.is_file() and not path.name.startswith(".")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--separator", default="")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to build (removed after); default: /tmp")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        found = speed(arguments, Path(place) / "many")
        for name, value in found.items():
            print(f"{name:32} {value:8.2f}", flush=True)
        for kind in ("clock", "processor time"):
            print(f"ratio by {kind}: {found[f'build, {kind}'] / found[f'sentencepiece, {kind}']:.2f}", flush=True)
        one, expected = Build(arguments, Path(place) / "one", 1), hashes(Path(place) / "many")
        assert one.running.wait() == 0
        same = hashes(Path(place) / "one") == expected
        print(f"by 1 process: {'the same' if same else 'DIFFERS'} ({len(expected)} files)", flush=True)
        same_after_kills(arguments, Path(place), expected, found["build seconds"])


if __name__ == "__main__":
    main()
