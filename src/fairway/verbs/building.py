"""Text to shards, as the command line asks for it."""

import json as json_text
import re
from pathlib import Path
from typing import Any

from fairway import doctor
from fairway.base.clock import Stopwatch
from fairway.base.errors import RecipeError
from fairway.base.files import read
from fairway.base.journal import Run
from fairway.data import building
from fairway.data.building import BuildSpec
from fairway.data.tokenizer import Tokenizer
from fairway.verbs.bar import bar
from fairway.verbs.printing import table


def build(sources: list[str], out: Path, model: Path, part: str, workers: int, as_json: bool, **settings: Any) -> None:
    number, parts = _part(part)
    spec = BuildSpec(part=number, parts=parts, **settings)
    watch = Stopwatch().start()
    run = Run(quiet=as_json, bar=bar)
    tokenizer = Tokenizer.from_bytes(read(model), str(model))
    try:
        manifest = building.build(sources, out, tokenizer, spec, workers, run, _code())
    except KeyboardInterrupt:
        run.say(f"{out}: what is done stays; the same command goes on from there")
        raise
    _tell(out, manifest, watch.stop(), as_json)


def join(parts: list[Path], out: Path, as_json: bool) -> None:
    watch = Stopwatch().start()
    manifest = building.join(parts, out, Run(quiet=as_json, bar=bar))
    _tell(out, manifest, watch.stop(), as_json)


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found:
        raise RecipeError(f"--part {text!r}: write it as 2/8, the second of eight parts")
    return int(found[1]), int(found[2])


def _code() -> str:
    return doctor.git_commit(Path(doctor.__file__).parent) or "none"


def _tell(out: Path, manifest: dict[str, Any], seconds: float, as_json: bool) -> None:
    if as_json:
        print(json_text.dumps({**manifest, "folder": str(out), "seconds": round(seconds, 3)}, indent=2))
        return
    counts = manifest["counts"]
    rows = []
    for name, split in manifest["splits"].items():
        per_token = f", {split['bytes'] / split['tokens']:.4f} bytes each" if split["tokens"] else ""
        shards = f"{len(split['shards'])} shard(s), {split['documents']:,} documents, {split['bytes']:,} bytes"
        rows.append((name, f"{split['tokens']:,}", shards + per_token))
    for name, why in _WHY.items():
        if counts[name]:
            rows.append((name, f"{counts[name]:,}", why))
    table(str(out), "tokens", rows)
    if loss := manifest["first_loss"]:
        where = f"{loss['place']}, byte {loss['byte']:,} of it"
        print(f"first loss: {where}: {loss['was']} comes back as {loss['comes_back']}")
        print("The shards hold the text that their tokens decode to, and a score on them is one of that text.")
    print(
        f"tokenizer {manifest['tokenizer']['sha256'][:16]}, source {manifest['source']['sha256'][:16]}, {seconds:.1f} s"
    )
    if "val" in manifest["splits"] and not manifest["splits"]["val"]["tokens"]:
        print("no document is held out: these shards alone cannot be a run's data.path")


_WHY = {
    "empty": "documents without a byte, left out",
    "invalid": "documents with bytes that are no UTF-8, replaced by U+FFFD",
    "replaced": "U+FFFD that were put in",
    "lost": "documents that do not come back from their tokens: the tokenizer loses text",
    "repeated": "training documents that stand in the held-out text too",
}
