"""Does a file decode under other thread counts and other paths of the math libraries?

    python bench/portable.py [ARTIFACT] [--text FILE] [--bytes 6000]

Writes the beginning of a text under one setting (one thread, the library's own choice of instructions) and decodes it
in a process of its own under each other setting, without and with adaptation. Unadapted files must be exact in all;
of adapted ones it says what holds: exact, or refused by the fingerprint of what learns, by a state, by a checksum. The
last column asks what the fingerprint forgoes: the same adapted file, its fingerprint passed over. `arithmetic` is a
hash of some float64 sums: equal where the setting changes none. Without ARTIFACT a tiny one is made (it adapts).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutations import tiny_artifact

from fairway.artifact import Artifact, open_artifact
from fairway.score import compress, settings_for

SAMPLE = Path(__file__).parents[1] / "tests" / "golden" / "sample.txt"
ONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SETTINGS: dict[str, dict[str, str]] = {
    "as written": ONE,
    "2 threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    "ATEN_CPU_CAPABILITY=avx2": {**ONE, "ATEN_CPU_CAPABILITY": "avx2"},
    "ATEN_CPU_CAPABILITY=default": {**ONE, "ATEN_CPU_CAPABILITY": "default"},
    "MKL_CBWR=COMPATIBLE": {**ONE, "MKL_CBWR": "COMPATIBLE"},
    "MKL_CBWR=AVX2": {**ONE, "MKL_CBWR": "AVX2"},
    "MKL_ENABLE_INSTRUCTIONS=SSE4_2": {**ONE, "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "ONEDNN_MAX_CPU_ISA=SSE41": {**ONE, "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "all of the oldest": {
        **{"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
        **{"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    },
}
REFUSALS = {  # the words of a refusal -> what refused
    "learning rounds otherwise": "fingerprint",
    "the adapted state is another": "state",
    "checksum": "checksum",
    "range coder": "checksum",
}
ARITHMETIC = """
import hashlib, torch
drawn = torch.Generator().manual_seed(0)
a, b = (torch.randn(n, 192, generator=drawn, dtype=torch.float64) for n in (1, 300))
sums = [a @ b.T, b @ b.T, b.exp().sum(1), torch.softmax(b, 1), torch.tanh(b)]
print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in sums)).hexdigest()[:8])
"""
DECODE = """
import sys
from pathlib import Path
from fairway.artifact import open_artifact
from fairway.base.errors import ArtifactError
from fairway.score.codec import files
artifact, content, out, trust = sys.argv[1:]
if trust == "trust":
    files.trial = lambda *_: files.read_header(Path(content).read_bytes(), "file")[0].machine
try:
    Path(out).write_bytes(files.decompress(open_artifact(artifact), Path(content).read_bytes()))
except ArtifactError as error:
    sys.exit(f"ArtifactError: {error}")
"""


def other_process(program: str, setting: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Exit code, and what it said last, of a fresh Python under a setting alone."""
    known = {name for values in SETTINGS.values() for name in values}
    environment = {name: value for name, value in os.environ.items() if name not in known} | setting
    line = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    said = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, said[-1] if said else ""


def verdict(artifact: Artifact, content: Path, texts: bytes, setting: dict[str, str], trust: str = "") -> str:
    """exact, refused: by what, WRONG, or FAILED; and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "out", time.perf_counter()
        code, said = other_process(DECODE, setting, str(artifact.path), str(content), str(out), trust)
        seconds = f" ({time.perf_counter() - start:.0f} s)"
        if code == 0:
            return ("exact" if out.read_bytes() == texts else "WRONG") + seconds
        by = next((name for words, name in REFUSALS.items() if words in said), None)
        if by is None or not said.startswith("ArtifactError"):
            print(said, file=sys.stderr)
            return "FAILED" + seconds
        return f"refused: {by}{seconds}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("artifact", type=Path, nargs="?")
    options.add_argument("--text", type=Path, default=SAMPLE)
    options.add_argument("--bytes", type=int, default=6000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.artifact is None:
            tiny_artifact(folder / "tiny.fw")
        artifact = open_artifact(given.artifact or folder / "tiny.fw")
        text = given.text.read_bytes()[: given.bytes]
        wrong = table(artifact, text, folder)
    raise SystemExit(1 if wrong else 0)


def table(artifact: Artifact, text: bytes, folder: Path) -> int:
    """Prints a row for each setting; how many verdicts must not be."""
    import torch

    torch.set_num_threads(1)
    files, wrong = {}, 0
    for adapt in (False, True):
        files[adapt] = folder / f"adapt-{adapt}.fwc"
        coded = compress(artifact, text, settings_for(artifact, adapt))
        files[adapt].write_bytes(coded.content)
        way = f"adapted, {coded.updates} updates" if adapt else "unadapted"
        print(f"{way}: {len(text):,} bytes, {coded.tokens:,} tokens -> {len(coded.content):,} bytes")
    print(f"{'decoded under':32}{'arithmetic':12}{'unadapted':24}{'adapted':28}{'adapted, fingerprint ignored'}")
    for name, setting in SETTINGS.items():
        _, arithmetic = other_process(ARITHMETIC, setting)
        plain = verdict(artifact, files[False], text, setting)
        learned = verdict(artifact, files[True], text, setting)
        trusted = verdict(artifact, files[True], text, setting, "trust")
        print(f"{name:32}{arithmetic:12}{plain:24}{learned:28}{trusted}", flush=True)
        wrong += not plain.startswith("exact")
        wrong += any(found.startswith(("WRONG", "FAILED")) for found in (learned, trusted))
    return wrong


if __name__ == "__main__":
    main()
