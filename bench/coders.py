"""Coders of the weights side by side, on the integers of trained runs and on codes of B6's size.

    python bench/coders.py RUN... [--parts ours,others,b6] [--coders rans,brotli,context]

ours    every coder of the slot, each group coded and decoded again: bytes, entropies, seconds
others  zstd -22, xz -9e, brotli -11, zpaq -m5, lrzip -z on the same integers (codes, scales, float16 numbers), in
        whatever arrangement suits each best: its own best order of codes (rows or columns) for each group, scales and
        float16 whole or with their bytes apart; or all of it as one stream, in any of these orders. zpaq and lrzip are
        programs (Debian packages of those names); where one is absent a line says so
b6      33.3M int5 and int8 codes with rows and columns of different size: bytes, entropy, seconds

A RUN is a run folder with integers.safetensors and artifact.fw.
"""

import argparse
import lzma
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fairway.artifact import Group, GroupLayout, TensorLayout, open_artifact
from fairway.artifact.bytestreams import brotli_pack
from fairway.artifact.coder.zstd import zstd_pack
from fairway.artifact.compare import Row, compare, measured
from fairway.artifact.container import grouped, numbers
from fairway.artifact.groups import ORDERS, flatten, to_bytes
from fairway.artifact.header import skeleton
from fairway.artifact.integers import read_integers
from fairway.base import slots
from fairway.base.journal import Run
from fairway.quant import Quantized

FOLDER = "fairway.artifact.coder"
Pack = Callable[[bytes], int]
B6 = {  # part: bits, tensors, rows, columns, standard deviation
    "embedding": (8, 1, 1024, 512, 30.0),
    "bigram": (8, 1, 6144, 128, 30.0),
    "bigram_proj": (5, 1, 512, 128, 2.2),
    "value": (8, 1, 1024, 128, 30.0),
    "value_proj": (5, 1, 512, 128, 2.2),
    **{part: (5, 11, 512, 512, 2.2) for part in "qkvo"},
    "up": (5, 11, 1792, 512, 2.2),
    "down": (5, 11, 512, 1792, 2.2),
}


def programs() -> dict[str, Pack]:
    """The bytes that each of the others makes of some."""
    found: dict[str, Pack] = {
        "zstd-22": lambda raw: len(zstd_pack(raw)),
        "xz -9e": lambda raw: len(lzma.compress(raw, lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)),
        "brotli-11": lambda raw: len(brotli_pack(raw)),
    }
    for name, command in (
        ("zpaq -m5", ["zpaq", "a", "{out}.zpaq", "{in}", "-m5"]),
        (
            "lrzip -z",
            ["lrzip", "-z", "-L", "9", "-T", "-o", "{out}.lrz", "{in}"],
        ),  # -T: tries incompressible blocks too
    ):
        if shutil.which(command[0]):
            found[name] = lambda raw, command=command: outside(command, raw)  # type: ignore[misc]
        else:
            print(f"{name}: absent; apt-get install {command[0]}", file=sys.stderr)
    return found


def outside(command: list[str], raw: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        place = {"in": f"{folder}/in", "out": f"{folder}/out"}
        Path(place["in"]).write_bytes(raw)
        subprocess.run([word.format(**place) for word in command], check=True, capture_output=True, cwd=folder)
        (made,) = Path(folder).glob("out.*")
        return made.stat().st_size


def loaded(run: Path) -> tuple[dict, object, int, list[Group]]:  # type: ignore[type-arg]
    artifact, tensors = open_artifact(run / "artifact.fw"), read_integers(run / "integers.safetensors")
    groups = list(grouped(tensors, skeleton(artifact.model_spec, artifact.vocab)))
    return tensors, artifact.model_spec, artifact.vocab, groups


def others(run: Path) -> dict[str, int]:
    """Each program's best arrangement of the tensor section."""
    tensors, _, _, groups = loaded(run)
    scales = numbers([tensor.scales for group in groups for tensor in group.layout.tensors])
    plain = numbers([value for value in tensors.values() if not isinstance(value, Quantized)])
    codes = [[to_bytes(flatten(group, order), group.layout.bits) for order in ORDERS] for group in groups]
    best = {}
    for name, pack in programs().items():
        each = [min(map(pack, pair)) for pair in codes]
        rest = [min(pack(raw), pack(apart(raw))) for raw in (scales, plain)]
        ways = {"groups": sum(each) + sum(rest)}
        picked = b"".join(min(pair, key=pack) for pair in codes)
        for order, stream in (("rows", 0), ("columns", 1), ("best", None)):
            body = picked if stream is None else b"".join(pair[stream] for pair in codes)
            for form, change in (("", bytes), (", bytes apart", apart)):
                ways[f"one stream, {order}{form}"] = pack(body + change(scales) + change(plain))
        way = min(ways, key=lambda key: ways[key])
        best[name] = ways[way]
        print(f"{name:12} {ways[way]:>11,}  as {way}; as groups {ways['groups']:,}", flush=True)
    return best


def apart(raw: bytes) -> bytes:
    return raw[0::2] + raw[1::2]


def ours(run: Path, kinds: list[str]) -> list[Row]:
    tensors, spec, vocab, _ = loaded(run)
    coders = [slots.technique(FOLDER, kind).Spec() for kind in kinds]
    rows = compare(tensors, spec, vocab, Run(quiet=False), coders)  # type: ignore[arg-type]
    shown(rows)
    return rows


def shown(rows: list[Row]) -> None:
    print(f"{'group':20} {'coder':12} {'bytes':>11} {'order 0':>11} {'model':>11} {'encode s':>9} {'decode s':>9}")
    for row in rows:
        model = "" if row.model_bytes is None else f"{row.model_bytes:,.0f}"
        print(
            f"{row.group:20} {row.coder:12} {row.bytes:11,} {row.order0_bytes:11,.0f} {model:>11}"
            f" {row.encode_seconds:9.2f} {row.decode_seconds:9.2f}",
            flush=True,
        )


def b6(kinds: list[str]) -> None:
    """Groups of B6's shapes: Gaussian codes, σ of rows and columns spread by 20 and 15 %."""
    chance, total = np.random.default_rng(0), {kind: np.zeros(5) for kind in kinds}
    for part, (bits, tensors, rows, cols, sigma) in B6.items():
        limit = 2 ** (bits - 1) - 1
        codes, layouts = [], []
        for layer in range(tensors):
            sizes = np.exp(chance.normal(0, 0.2, (rows, 1)) + chance.normal(0, 0.15, (1, cols)))
            drawn = np.round(chance.normal(0, sigma, (rows, cols)) * sizes)
            codes.append(np.clip(drawn, -limit, limit).astype(np.int8))
            layouts.append(TensorLayout(f"{part}{layer}", rows, cols, layer, np.full(rows, 0.066, np.float16)))
        group = Group(GroupLayout(part, bits, tuple(layouts)), tuple(codes))
        for kind in kinds:
            row, cpu = measured(group, slots.technique(FOLDER, kind).Spec()), time.process_time()
            module, spec = slots.technique(FOLDER, kind), slots.technique(FOLDER, kind).Spec()
            blob = module.encode(group, spec)
            cpu = time.process_time()
            module.decode(blob, group.layout)
            cpu = time.process_time() - cpu
            total[kind] += (row.bytes, row.order0_bytes, row.encode_seconds, row.decode_seconds, cpu)
    for kind, (size, floor, encode, decode, cpu) in total.items():
        print(
            f"{kind:10} {size:12,.0f} bytes, order 0 {floor:,.0f}; encode {encode:.1f} s, decode {decode:.1f} s"
            f" (again: {cpu:.1f} CPU-seconds)"
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("runs", type=Path, nargs="*")
    options.add_argument("--parts", default="ours,others,b6")
    options.add_argument("--coders", default=",".join(slots.kinds(FOLDER)))
    given = options.parse_args()
    parts, kinds = given.parts.split(","), given.coders.split(",")
    for run in given.runs:
        print(f"== {run.name}")
        totals = [row for row in ours(run, kinds) if row.group == "total"] if "ours" in parts else []
        best = min(others(run).values()) if "others" in parts else None
        for row in totals if best else []:
            print(f"{row.coder:12} {row.bytes / best:.4f} of the best other")
    if "b6" in parts:
        b6([kind for kind in kinds if kind not in ("lzma", "brotli")] if len(kinds) > 3 else kinds)


if __name__ == "__main__":
    main()
