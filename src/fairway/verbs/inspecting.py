"""Token shards, examined: what they hold, and whether that is what was published."""

import json as json_text
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fairway.base import files
from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import Run
from fairway.data.inspecting import Inspection
from fairway.data.inspecting import inspect as inspect_set
from fairway.data.published import KNOWN, check, differing, published_for
from fairway.data.shardsets import RECEIPT, of_split, shard_sets, tokenizer_beside
from fairway.data.tokenizer import Tokenizer
from fairway.verbs.bar import bar
from fairway.verbs.printing import printable, table

_WIDTH = 40  # characters of the longest bar


def inspect(place: Path, model: Path | None, samples: int, as_json: bool) -> None:
    sets = shard_sets(place)
    tokenizer = tokenizer_beside(place, model)
    run = Run(quiet=as_json, bar=bar)
    found = [inspect_set(one, tokenizer, samples, run) for one in sets]
    if as_json:
        plain = [asdict(one) | {"bytes_per_token": one.bytes_per_token} for one in found]
        print(json_text.dumps({"tokenizer": _described(tokenizer), "sets": plain}, indent=2))
        return
    for one in found:
        _show(one)
    if tokenizer is None:
        print(f"no tokenizer beside {place}: bytes and samples are left out; name one with --tokenizer")
    else:
        print(f"tokenizer: {tokenizer.size:,} pieces, sha256 {tokenizer.sha256}")


def stats(folder: Path, model: Path | None, as_json: bool) -> None:
    sets = shard_sets(folder)
    tokenizer = tokenizer_beside(folder, model)
    if tokenizer is None:
        raise RecipeError(f"{folder}: no tokenizer beside the shards; name it with --tokenizer")
    facts, run = published_for(tokenizer), Run(quiet=as_json, bar=bar)
    train = of_split(sets, "train", folder) if any("train" in one.name for one in sets) else None
    rows = check(of_split(sets, "val", folder), train, tokenizer, facts, run)
    wrong = differing(rows)
    files_wrong, files_seen = _compared_with_receipt(folder, run)
    if as_json:
        answer = {"published": facts.name, "tokenizer": _described(tokenizer), "checks": [asdict(row) for row in rows]}
        print(json_text.dumps(answer | {"files": files_seen, "files_differ": files_wrong}, indent=2))
    else:
        print(f"published for {facts.name} (tokenizer sha256 {tokenizer.sha256[:16]}…)")
        shown = [(row.fact, row.published, f"{row.found}  {row.verdict}") for row in rows]
        if files_seen:
            good = "same" if not files_wrong else "DIFFERS"
            shown.append(("files as fetched, by sha256", f"{files_seen}", f"{files_seen - len(files_wrong)}  {good}"))
        table("fact", "published", shown)
    if wrong or files_wrong:
        raise DataError(f"{folder}: not as published: {', '.join([*wrong, *files_wrong])}; fetch the folder again")


def _compared_with_receipt(folder: Path, run: Run) -> tuple[list[str], int]:
    """(files that are not as they were fetched, files that were looked at)."""
    path = folder / RECEIPT
    if not path.exists():
        return [], 0
    try:
        rows = [
            (str(row["name"]), int(row["bytes"]), str(row["sha256"]))
            for row in json_text.loads(path.read_bytes())["files"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no receipt of a fetch; remove it, or fetch the folder again") from error
    wrong, done = list[str](), 0
    with run.meter("hash", sum(size for _, size, _ in rows), "B") as meter:
        for name, size, sha256 in rows:
            if not (folder / name).is_file() or files.sha256(folder / name) != sha256:
                wrong.append(name)
            done += size
            meter.update(done)
    return wrong, len(rows)


def _described(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    known = KNOWN.get(tokenizer.sha256)
    return {"sha256": tokenizer.sha256, "pieces": tokenizer.size, "published_as": known.name if known else None}


def _show(one: Inspection) -> None:
    per_token = "" if one.bytes_per_token is None else f"{one.bytes_per_token:.4f} for each token, as decoded"
    rows = [
        ("shards", f"{one.shards:,}", ""),
        ("documents", f"{one.documents:,}", f"{one.empty:,} of them empty" if one.empty else ""),
        ("tokens", f"{one.tokens:,}", f"{one.pieces:,} different ones, BOS among them"),
    ]
    if one.bytes is not None:
        rows.append(("bytes", f"{one.bytes:,}", per_token))
    if one.original_bytes is not None:
        rows.append(("original bytes", f"{one.original_bytes:,}", "of the text before it was tokens, by the sidecar"))
    if one.before_first:
        rows.append(
            ("before the first BOS", f"{one.before_first:,}", "tokens: the end of a document that began elsewhere")
        )
    rows.append(
        ("tokens of a document", f"{one.mean:,.0f}", f"median {one.median:,.0f}, {one.shortest:,} to {one.longest:,}")
    )
    table(one.name, "", rows)
    most = max((count for *_, count in one.lengths), default=0)
    for low, high, count in one.lengths:
        drawn = "█" * round(_WIDTH * count / most) or ("▏" if count else "")
        print(f"{low:>11,} to {high - 1:<11,} {drawn:<{_WIDTH}} {count:,}")
    for sample in one.samples:
        print(f"document {sample.number:,} ({sample.tokens:,} tokens): {printable(sample.text)}")
    print()
