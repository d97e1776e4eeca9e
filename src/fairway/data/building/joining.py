"""The parts of a build, made on several hosts, become the shards that one host would have made, byte for byte."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from heapq import merge
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fairway.base import files
from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import Run
from fairway.data.building import sidecar
from fairway.data.building.folder import Folder, read_manifest
from fairway.data.building.sidecar import BYTES, COLUMNS, START, TURN, Rows
from fairway.data.building.spec import BuildSpec
from fairway.data.building.work import Counts, Encoded
from fairway.data.sources.shards import open_shard
from fairway.data.splits import Uint16

_PER_PART = ("part", "parts")
_JOINED = "joined"  # in place of a source's hash, in the checkpoint


def join(parts: Sequence[Path], folder: Path, run: Run | None = None) -> dict[str, Any]:
    """The shards of all parts of one build, in `folder`; returns the manifest, that of a build by one host.

    RecipeError where a part is missing, named twice or of another build; DataError where its files are not what its
    manifest says.
    """
    run, manifests = run or Run(), [read_manifest(path) for path in parts]
    order = _ordered(parts, manifests)
    settings = {**manifests[0]["settings"], "part": 1, "parts": 1}
    spec = BuildSpec(**{field.name: settings[field.name] for field in fields(BuildSpec)})
    opened = Folder(folder, spec, settings)
    try:
        if opened.done is not None:
            return opened.done
        if (begun := opened.next) and opened.digest != _JOINED:
            raise RecipeError(f"{folder}: a build by one host was begun here; name another folder with -o")
        with run.meter("join", sum(m["counts"]["bytes"] for m in manifests), "B") as meter:
            for one in _turns([parts[at] for at in order], [manifests[at] for at in order]):
                if one.number >= begun:
                    opened.add(one)
                meter.update(one.read, documents=opened.counts.documents)
        _count(opened, manifests)
        if not opened.counts.documents:
            raise DataError(f"{parts[0]}: no document in any part; name a source that holds some")
        tokenizer = manifests[0]["tokenizer"]
        files.write(folder / tokenizer["file"], files.read(parts[0] / tokenizer["file"]))
        return opened.finish(_source(manifests), tokenizer, manifests[0]["code"])
    finally:
        opened.close()


def _ordered(parts: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> list[int]:
    """The places of part 1, 2, ... among the given ones."""
    settings = [{k: v for k, v in m["settings"].items() if k not in _PER_PART} for m in manifests]
    asked = manifests[0]["settings"]["parts"]
    if asked == 1:
        raise RecipeError(f"{parts[0]}: no part of a build, but a whole one; nothing is to be joined")
    places: dict[int, int] = {}
    for at, (path, manifest) in enumerate(zip(parts, manifests, strict=True)):
        for name in settings[0]:
            if settings[at].get(name) != settings[0][name]:
                raise RecipeError(
                    f"{path}: {name} = {settings[at].get(name)!r}, but {settings[0][name]!r} in {parts[0]}"
                )
        if manifest["settings"]["parts"] != asked:
            raise RecipeError(f"{path}: of {manifest['settings']['parts']} parts, but {parts[0]} of {asked}")
        same = {"source": ("sha256", "bytes"), "tokenizer": ("sha256", "sentencepiece")}
        for table, names in same.items():
            for name in names if table == "tokenizer" or not manifest["source"]["by_files"] else ():
                if manifest[table][name] != manifests[0][table][name]:
                    raise RecipeError(f"{path}: another {table} than {parts[0]} ({name}); build it again")
        number = manifest["settings"]["part"]
        if number in places:
            raise RecipeError(f"{path}: part {number} again, after {parts[places[number]]}; name each part once")
        places[number] = at
    if missing := [str(number) for number in range(1, asked + 1) if number not in places]:
        raise RecipeError(f"part {', '.join(missing)} of {asked}: missing; name the folders of all parts")
    return [places[number] for number in range(1, asked + 1)]


def _turns(parts: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> Iterator[Encoded]:
    """The documents of all parts in the order of the source, those of one turn together."""
    streams = [_turns_of(path, manifest) for path, manifest in zip(parts, manifests, strict=True)]
    done = 0
    for number, (_, tokens, rows) in enumerate(merge(*streams, key=lambda one: one[0])):
        done += int(rows[:, BYTES].sum())
        yield Encoded(number, _JOINED, done, tokens, rows, Counts(), None)


def _turns_of(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[int, Uint16, Rows]]:
    """(turn, tokens, rows) of one part, turn by turn; a document may reach over several of the part's shards."""
    held_tokens, held_rows = list[Uint16](), np.zeros((0, COLUMNS), dtype=np.uint64)
    for row in manifest["splits"]["part"]["shards"]:
        shard, rows = open_shard(folder / row["name"]), sidecar.read(sidecar.path_of(folder / row["name"]))
        if (len(shard.tokens), len(rows)) != (row["tokens"], row["documents"]):
            raise DataError(f"{shard.path}: not the shard of the manifest beside it; build this part again")
        at = 0
        for first, last in _stretches(rows):
            start = int(rows[first, START])
            held_tokens.append(shard.tokens[at:start])
            if len(held_rows):
                yield _whole(held_tokens, held_rows)
            held_tokens, held_rows, at = [], np.array(rows[first:last]), start
            held_rows[:, START] -= np.uint64(start)
        held_tokens.append(shard.tokens[at:])
    if len(held_rows):
        yield _whole(held_tokens, held_rows)


def _whole(tokens: list[Uint16], rows: Rows) -> tuple[int, Uint16, Rows]:
    return int(rows[0, TURN]), np.concatenate(tokens), rows


def _stretches(rows: Rows) -> Iterator[tuple[int, int]]:
    """[first, last) of documents of one turn that begin within the same million tokens: what is held at once."""
    changes = np.diff(rows[:, TURN]).astype(np.bool_) | np.diff(rows[:, START] >> np.uint64(20)).astype(np.bool_)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(rows)]
    yield from ((a, b) for a, b in pairwise(edges) if a < b)


def _count(opened: Folder, manifests: Sequence[dict[str, Any]]) -> None:
    """What only the parts know, and the first loss of all: the one whose turn is first."""
    summed = Counts()
    for manifest in manifests:
        summed += Counts(**manifest["counts"])
    opened.counts = replace(summed, repeated=opened.counts.repeated)
    losses = [m["first_loss"] for m in manifests if m["first_loss"]]
    if losses:
        opened.loss = min(losses, key=lambda loss: loss["turn"])


def _source(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = manifests[0]["source"]
    if not first["by_files"]:
        return first
    total = sum(int(m["source"]["sha256"], 16) for m in manifests) % (1 << 256)
    sums = {name: sum(m["source"][name] for m in manifests) for name in ("files_read", "bytes")}
    return {**first, **sums, "sha256": f"{total:064x}", "by_files": False}
