"""Text to shards, as the command line asks for it."""

import json as json_text
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fairway import doctor
from fairway.base import specs
from fairway.base.clock import Stopwatch
from fairway.base.errors import RecipeError
from fairway.base.files import read, write
from fairway.base.journal import Run
from fairway.data import building
from fairway.data.building import BuildSpec
from fairway.data.tokenizer import Tokenizer, TokenizerSpec
from fairway.verbs.bar import bar
from fairway.verbs.printing import answer, table


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


def train_tokenizer(sources: list[str], out: Path, wanted: dict[str, Any], as_json: bool, **settings: Any) -> None:
    watch = Stopwatch().start()
    try:
        tokenizer = specs.build(TokenizerSpec, wanted)
    except ValueError as error:
        raise RecipeError(f"fairway data tokenizer train: {error}") from None
    taught = building.teach(sources, tokenizer, BuildSpec(**settings), Run(quiet=as_json, bar=bar))
    write(out, taught.model)
    made = Tokenizer.from_bytes(taught.model, str(out))
    facts = {key: value for key, value in asdict(taught).items() if key != "model"}
    facts = {"file": str(out), "sha256": made.sha256, "pieces": made.size, "lossless": made.has_bytes, **facts}
    facts["seconds"] = round(watch.stop(), 3)
    line = (
        f"{out}: {made.size:,} pieces, {len(taught.model):,} bytes, sha256 {made.sha256[:16]}; learned from "
        f"{taught.sample_bytes:,} bytes in {taught.sample_documents:,} of {taught.train_documents:,} training "
        f"documents ({taught.train_bytes:,} bytes), {taught.held_out_documents:,} held out; {facts['seconds']:.1f} s"
    )
    if not made.has_bytes:
        line += "\nno room for byte pieces: characters that have no piece are lost"
    answer(facts, line, as_json)


def compare_tokenizers(models: list[Path], text: Path, separator: str, most_bytes: int, as_json: bool) -> None:
    documents = building.beginning(str(text), separator, most_bytes)
    tokenizers = [Tokenizer.from_bytes(read(model), str(model)) for model in models]
    rows = [building.compare(tokenizer, documents) for tokenizer in tokenizers]
    facts = {"documents": len(documents), "bytes": sum(map(len, documents)), "rows": [asdict(row) for row in rows]}
    if as_json:
        print(json_text.dumps(facts, indent=2))
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("tokenizer", "pieces", "bytes/token", "tokens/word", "MB/s", "lost", "bits/byte"):
        drawn.add_column(heading, justify="left" if heading == "tokenizer" else "right")
    for row in rows:
        mark = "*" if row.lost else ""
        drawn.add_row(
            f"{Path(row.name).name} {row.sha256[:12]}",
            f"{row.pieces:,}",
            f"{row.bytes_per_token:.4f}",
            f"{row.tokens_per_word:.4f}",
            f"{row.megabytes_per_second:.2f}",
            f"{row.lost:,}",
            f"{row.bits_per_byte:.4f}{mark}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)
    print(
        f"{facts['bytes']:,} bytes, {len(documents):,} documents; bits/byte: token {building.ORDER}-gram, second half"
    )
    if any(row.lost for row in rows):
        print("* another text: of `lost` documents the tokenizer returns something else, which is easier to foretell")


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
