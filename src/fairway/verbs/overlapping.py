"""Documents that training and held-out data share."""

import json as json_text
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import Run
from fairway.data.building.listing import Kind, files_of
from fairway.data.building.processes import cores
from fairway.data.building.reading import Digest, blocks, segments_of
from fairway.data.building.spec import BuildSpec
from fairway.data.overlap import Example, Overlap, batched, of_block, of_shards, of_tokens, scan
from fairway.data.shardsets import BOS, holds_shards, of_split, shard_sets, tokenizer_beside
from fairway.data.tokenizer import Tokenizer
from fairway.verbs.bar import bar
from fairway.verbs.printing import printable, table


@dataclass(frozen=True)
class Side:
    """What one side gives to the scan. total: what its groups have read in the end, for the progress."""

    groups: Iterable[Any]
    total: int
    tokenizer: Tokenizer | None = None


def overlap(
    train: list[str],
    held_out: str,
    kind: str,
    separator: str,
    text_key: str,
    near: float,
    model: Path | None,
    examples: int,
    workers: int,
    as_json: bool,
) -> None:
    if not 0.3 <= near <= 1:
        raise RecipeError(f"--near {near:g}: 0.3 to 1 is possible; below it too many pairs would have to be looked at")
    run, processes = Run(quiet=as_json, bar=bar), workers or cores()
    shards = [place for place in (*train, held_out) if holds_shards(Path(place))]
    if shards and len(shards) <= len(train):
        raise RecipeError(f"{shards[0]}: token shards, beside text; give two of a kind")
    if shards:
        if len(train) > 1:
            raise RecipeError(f"{train[1]}: one folder of shards, or one shard, is expected before the held-out one")
        left, right = _tokens(Path(train[0]), "train", model), _tokens(Path(held_out), "val", model)
        if left.tokenizer and right.tokenizer and left.tokenizer.sha256 != right.tokenizer.sha256:
            raise DataError(f"{train[0]} and {held_out}: made by different tokenizers; compare their texts instead")
        found = scan(left.groups, right.groups, of_tokens, near, examples, processes, run, left.total)
        tokenizer = left.tokenizer or right.tokenizer
    else:
        if kind not in get_args(Kind) and kind != "auto":
            raise RecipeError(f"--format {kind}: choices: auto, {', '.join(get_args(Kind))}")
        spec = BuildSpec(kind=cast(Any, kind), separator=separator, text_key=text_key)
        left, right, tokenizer = _text(train, spec), _text([held_out], spec), None
        found = scan(left.groups, right.groups, partial(of_block, spec), near, examples, processes, run, left.total)
    if not found.held_out or not found.train:
        raise DataError(f"{held_out if not found.held_out else train[0]}: no document in it; name a place with some")
    _answer(found, bool(shards), tokenizer, as_json)


def _text(sources: list[str], spec: BuildSpec) -> Side:
    listed = files_of(sources, spec.kind)
    segments = segments_of(listed, spec.separator, spec.text_key, spec.longest)
    return Side(blocks(segments, listed, Digest()), sum(file.bytes for file in listed))


def _tokens(place: Path, split: str, model: Path | None) -> Side:
    one, tokenizer = of_split(shard_sets(place), split, place), tokenizer_beside(place, model)
    groups = batched(of_shards(one.shards, tokenizer.bos if tokenizer else BOS))
    return Side(groups, 2 * one.tokens, tokenizer)


def _answer(found: Overlap, tokens: bool, tokenizer: Tokenizer | None, as_json: bool) -> None:
    examples = [(example, _text_of(example, tokens, tokenizer)) for example in found.examples]
    if as_json:
        plain = asdict(found) | {"exact_share": found.exact_share, "near_share": found.near_share}
        plain["compared"] = "tokens" if tokens else "folded text"
        plain["examples"] = [asdict(example) | {"text": text} for example, text in examples]
        print(json_text.dumps(plain, indent=2))
        return
    kind = "bytes of tokens" if tokens else "bytes"
    same = "the same tokens" if tokens else "the same but for case and white space"
    rows = [
        ("training documents", f"{found.train:,}", f"{found.train_bytes:,} {kind}"),
        ("held-out documents", f"{found.held_out:,}", f"{found.held_out_bytes:,} {kind}"),
        ("exact duplicates", f"{found.exact:,}", f"{found.exact_share:.4%} of the held-out documents: {same}"),
        ("near duplicates", f"{found.near:,}", f"{found.near_share:.4%}: at least {found.limit:g} of their shingles"),
        ("in training, exact", f"{found.train_exact:,}", "training documents that stand in the held-out text"),
        ("in training, near", f"{found.train_near:,}", ""),
    ]
    if found.empty:
        rows.insert(2, ("empty", f"{found.empty:,}", "held-out documents without content: compared with nothing"))
    table("overlap", "documents", rows)
    for example, text in examples:
        how = "the same" if example.alike == 1.0 else f"about {example.alike:.2f} alike"
        print(f"{example.held_out} and {example.train}: {how}\n    {printable(text)[:160]}")


def _text_of(example: Example, tokens: bool, tokenizer: Tokenizer | None) -> str:
    if not tokens:
        return example.text.decode("utf-8", "replace")
    ids = np.frombuffer(example.text, dtype=np.uint16)
    if tokenizer is None:
        return " ".join(map(str, ids[:20].tolist()))
    return tokenizer.decode(ids, previous=tokenizer.bos).decode("utf-8", "replace")
