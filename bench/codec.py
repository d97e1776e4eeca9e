"""The codec on one artifact and one text: sizes beside other compressors, speed, where the time goes, exactness.

    python bench/codec.py ARTIFACT FILE [--bytes 1000000] [--adapt] [--parts sizes,speed,modes,shares] [--stage own]

sizes: the compressed file, the coder's words and the ideal code length, beside xz, zstd, brotli, bzip2 (and 7z's PPMd
and zpaq -m5 where these programs are found). speed: compress and decompress, processes and groups as the command line
takes them, peak memory. modes: bits per byte of plain, sliding and rolling windows on the same text, in float32 and in
exact mode. shares: what a decoding step consists of.
"""

import argparse
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from fairway.artifact import Artifact, open_artifact
from fairway.base.journal import Run
from fairway.model import linear
from fairway.score import Ledger, ScoreSpec, baselines, compress, decompress, settings_for, spec_of, tokens_of
from fairway.score.adapt import none
from fairway.score.codec import part
from fairway.score.evaluate import model_on, score_model, stream_of
from fairway.score.windows import plain, rolling, sliding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--adapt", action="store_true")
    parser.add_argument("--own", action="store_true", help="the artifact's own windows (sliding), not rolling")
    parser.add_argument("--lanes", type=int, default=0)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--parts", default="sizes,speed,modes,shares")
    options = parser.parse_args()
    artifact, text = open_artifact(options.artifact), options.file.read_bytes()[: options.bytes]
    parts = options.parts.split(",")
    if "speed" in parts or "sizes" in parts:
        codec(artifact, text, options, beside="sizes" in parts)
    if "modes" in parts:
        modes(artifact, text)
    if "shares" in parts:
        shares(artifact, text[:20_000], options.lanes or 32)


def settings(artifact: Artifact, options: argparse.Namespace) -> ScoreSpec:
    spec = settings_for(artifact, options.adapt, options.lanes, options.bytes)
    return replace(spec, windows=spec_of(artifact).windows, lanes=1) if options.own else spec


def codec(artifact: Artifact, text: bytes, options: argparse.Namespace, beside: bool) -> None:
    spec, run = settings(artifact, options), Run(quiet=False)
    begun = time.perf_counter()
    coded = compress(artifact, text, spec, run, options.groups, options.processes)
    middle = time.perf_counter()
    same = decompress(artifact, coded.content, "file", run, options.processes) == text
    ended = time.perf_counter()
    size = len(coded.content)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    rows = [
        ("text", f"{len(text):,}", f"{coded.tokens:,} tokens"),
        ("file", f"{size:,}", f"{8 * size / len(text):.4f} bits per byte; decoded {'equal' if same else 'DIFFERENT'}"),
        ("ideal", f"{coded.ideal_bits / 8:,.0f}", f"the file {100 * (8 * size / coded.ideal_bits - 1):+.4f} %"),
        (
            "coded",
            f"{coded.coded_bits / 8:,.0f}",
            f"words {100 * (8 * coded.word_bytes / coded.coded_bits - 1):+.4f} %",
        ),
        ("framing", f"{coded.framing_bytes:,}", f"{coded.updates} updates"),
        ("compress", f"{middle - begun:.1f} s", f"{len(text) / 1000 / (middle - begun):.2f} KB/s"),
        ("decompress", f"{ended - middle:.1f} s", f"{len(text) / 1000 / (ended - middle):.2f} KB/s"),
        ("memory", f"{peak / 1e3:,.0f} MB", "the largest process"),
    ]
    if beside:
        found = {name: value for name, value in baselines(text).items() if value is not None} | programs(text)
        rows += [(name, f"{value * len(text) / 8:,.0f}", f"{value:.4f} bits per byte") for name, value in found.items()]
    show(("what", "bytes", ""), rows)


def programs(text: bytes) -> dict[str, float]:
    """PPMd of 7z (order 16) and zpaq -m5, where they are installed: bits per byte of `text` alone."""
    commands = {
        "7z PPMd o16": ["7z", "a", "-bso0", "-bsp0", "-m0=PPMd:o=16:mem=1024m", "out.7z", "text"],
        "zpaq -m5": ["zpaq", "a", "out.zpaq", "text", "-m5"],
    }
    found = {}
    for name, command in commands.items():
        if shutil.which(command[0]):
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "text").write_bytes(text)
                subprocess.run(command, cwd=folder, check=True, capture_output=True)
                found[name] = 8 * next(Path(folder).glob("out.*")).stat().st_size / len(text)
    return found


def modes(artifact: Artifact, text: bytes) -> None:
    """The same text in every window mode, unadapted; per token, and a twelfth of the text at a time."""
    tokens = tokens_of(artifact, text)
    targets, base = len(tokens) - 1, replace(spec_of(artifact), adapt=none.Spec(), result="sliding", exact=False)
    context = base.context or artifact.model_spec.context
    cases = [
        ("plain", plain.Spec(), 1, False),
        (f"sliding {context}/{context // 4}", sliding.Spec(context // 4), 1, False),
        (f"sliding {context}/{context // 16}", sliding.Spec(context // 16), 1, False),
        ("rolling", rolling.Spec(), 1, False),
        ("rolling, 8 lanes", rolling.Spec(), 8, False),
        ("rolling, 32 lanes", rolling.Spec(), 32, False),
        ("rolling, exact", rolling.Spec(), 1, True),
    ]
    rows, first = [], 0.0
    for name, windows, lanes, exact in cases:
        spec = replace(base, windows=windows, lanes=lanes, exact=exact)
        stream, ledger = stream_of("sliding", targets, spec, artifact.model_spec.context), Ledger(targets)
        begun = time.perf_counter()
        model = model_on(artifact, None, exact)
        score_model(model, tokens.tokens, stream, spec, "sliding", artifact.vocab, ledger)
        seconds, bits = time.perf_counter() - begun, ledger.price(slice(None)) / np.log(2)
        first = bits.mean() if name == "rolling" else first
        gap = f"; {bits.mean() - first:+.2e} bits per token against float32" if exact else ""
        twelfths = " ".join(f"{part.mean():.2f}" for part in np.array_split(bits, 12))
        rows.append((name, f"{bits.sum() / len(text):.4f}", f"{seconds:.1f} s; {twelfths}{gap}"))
    show(("windows", "bits per byte", "seconds; bits per token by twelfths of the text"), rows)


def shares(artifact: Artifact, text: bytes, lanes: int) -> None:
    """Seconds of decoding by what they are spent on: functions are timed from outside."""
    spec = replace(settings_for(artifact, False, lanes), lanes=lanes)
    tokens = np.concatenate([[artifact.tokenizer.bos], artifact.tokenizer.encode_exactly(text)]).astype(np.uint16)
    encoded = part.encode_part(artifact, tokens, spec, "sliding", 1 << 16)
    spent: dict[str, float] = {}
    with (
        timed(F, "scaled_dot_product_attention", spent, "attention"),
        timed(F, "linear", spent, "matrix products"),
        timed(part.exact, "counts", spent, "counts"),
        timed(part.exact, "grid", spent, "grid"),
    ):
        begun = time.perf_counter()
        part.decode_part(artifact, encoded.part, spec, "sliding", "file")
        whole = time.perf_counter() - begun
    assert linear.F is F
    steps = -(-encoded.part.targets // lanes)
    rows = [(name, f"{1e3 * seconds / steps:.2f}", f"{100 * seconds / whole:.0f} %") for name, seconds in spent.items()]
    rest = whole - sum(spent.values())
    rows += [("the rest", f"{1e3 * rest / steps:.2f}", f"{100 * rest / whole:.0f} %")]
    rows += [("a step", f"{1e3 * whole / steps:.2f}", f"{lanes} lanes, {torch.get_num_threads()} thread")]
    show((f"decoding {len(text):,} bytes", "ms a step", ""), rows)


@contextmanager
def timed(module: object, name: str, spent: dict[str, float], label: str) -> Iterator[None]:
    inner: Callable[..., object] = getattr(module, name)

    def outer(*arguments: object, **named: object) -> object:
        begun = time.perf_counter()
        try:
            return inner(*arguments, **named)
        finally:
            spent[label] = spent.get(label, 0.0) + time.perf_counter() - begun

    setattr(module, name, outer)
    try:
        yield
    finally:
        setattr(module, name, inner)


def show(columns: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(columns[0])
    table.add_column(columns[1], justify="right")
    table.add_column(columns[2])
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
