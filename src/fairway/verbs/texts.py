"""A person's own text: compressed, given back, or written by the model."""

import sys
from dataclasses import asdict
from pathlib import Path

from fairway.artifact import open_artifact
from fairway.base.clock import Stopwatch
from fairway.base.devices import choose
from fairway.base.errors import RecipeError
from fairway.base.files import read, write
from fairway.base.journal import Run
from fairway.score import compress as compressed
from fairway.score import decompress as decompressed
from fairway.score import sample as sampled
from fairway.score import settings_for
from fairway.verbs.bar import bar
from fairway.verbs.printing import answer


def compress(file: str, artifact: Path, out: str, adapt: bool, lanes: int, as_json: bool) -> None:
    quiet = _quiet("compress", "file", out, as_json)
    opened, watch = open_artifact(artifact), Stopwatch().start()
    text = _take(file)
    coded = compressed(
        opened, text, settings_for(opened, adapt, lanes, len(text)), Run(quiet=quiet, bar=bar), processes=0
    )
    _give(out, coded.content)
    seconds = watch.stop()
    facts = {key: value for key, value in asdict(coded).items() if key != "content"}
    facts |= {"file_bytes": len(coded.content), "seconds": round(seconds, 3)}
    if not quiet or as_json:
        share = f", {8 * len(coded.content) / len(text):.4f} bits per byte" if text else ""
        line = f"{out}: {len(text):,} bytes -> {len(coded.content):,}{share}; {seconds:.1f} s"
        answer(facts, line, as_json)


def decompress(file: str, artifact: Path, out: str, as_json: bool) -> None:
    quiet = _quiet("decompress", "text", out, as_json)
    opened, watch = open_artifact(artifact), Stopwatch().start()
    content = _take(file)
    text = decompressed(
        opened, content, "standard input" if file == "-" else file, Run(quiet=quiet, bar=bar), processes=0
    )
    _give(out, text)
    seconds = watch.stop()
    if not quiet or as_json:
        facts = {"file_bytes": len(content), "text_bytes": len(text), "seconds": round(seconds, 3)}
        answer(facts, f"{out}: {len(content):,} bytes -> {len(text):,}; {seconds:.1f} s", as_json)


def sample(artifact: Path, prompt: str, tokens: int, temperature: float, seed: int, device: str, as_json: bool) -> None:
    opened = open_artifact(artifact)
    if as_json:
        text = "".join(sampled(opened, prompt, tokens, temperature, seed, choose(device)))
        answer({"prompt": prompt, "text": text, "seed": seed}, "", as_json)
        return
    sys.stdout.write(prompt)
    for piece in sampled(opened, prompt, tokens, temperature, seed, choose(device)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _quiet(verb: str, what: str, out: str, as_json: bool) -> bool:
    """Whether standard output is taken, by what is written or by JSON; by both: RecipeError."""
    if as_json and out == "-":
        raise RecipeError(
            f"fairway {verb}: --json and the {what} cannot both go to standard output; name a file with -o"
        )
    return as_json or out == "-"


def _take(name: str) -> bytes:
    return sys.stdin.buffer.read() if name == "-" else read(Path(name))


def _give(name: str, content: bytes) -> None:
    if name == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        write(Path(name), content)
