"""The folder of a build: its lock, its checkpoint, its splits, its manifest.

`manifest.json` stands there when the build is whole, and `.building.json`, the checkpoint, until then. Everything that
the manifest says follows from the source, the tokenizer and the settings alone, so that it is the same whoever built.
"""

import glob
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fairway.base import files, folders
from fairway.base.errors import DataError, FairwayError, RecipeError
from fairway.data.building import sidecar
from fairway.data.building.sidecar import COLUMNS, KEY, START, Rows
from fairway.data.building.spec import BuildSpec
from fairway.data.building.work import Counts, Encoded
from fairway.data.building.writing import Shards, give_names, hidden, plain
from fairway.data.splits import Uint16

FORMAT = 1
MANIFEST, CHECKPOINT = "manifest.json", ".building.json"
SECONDS = 2.0  # between checkpoints: what a kill may cost

Mask = npt.NDArray[np.bool_]


class Folder:
    """A build on its way. settings: plain values that a resumed build must share; next: the number of the block to be
    added; digest: of the source up to there. done: the manifest of a build that is whole already, else None."""

    def __init__(self, path: Path, spec: BuildSpec, settings: Mapping[str, Any]) -> None:
        self.path, self.spec, self.settings = path, spec, dict(settings)
        self.splits = ("part",) if spec.parts > 1 else ("train", "val")
        self.next, self.digest, self.read = 0, "", 0
        self.counts, self.loss, self.held_out = Counts(), dict[str, Any](), 0
        self._held: npt.NDArray[np.uint64] | None = None
        self._lock = _locked(path)
        self._saved = time.monotonic()
        columns = COLUMNS if spec.parts > 1 else COLUMNS - 1
        self.shards = {split: Shards(path, split, spec.shard_tokens, columns) for split in self.splits}
        self.sealed: dict[str, list[dict[str, Any]]] = {split: [] for split in self.splits}
        self._halfway = False  # through a block
        try:
            self.done = self._take_up()
        except BaseException:
            self.close()
            raise

    def add(self, encoded: Encoded) -> None:
        """The next block's documents, each to its split; now and then a checkpoint."""
        rows, self._halfway = encoded.rows, True
        self.counts += encoded.counts
        if encoded.loss is not None and not self.loss:
            self.loss = asdict(encoded.loss)
        if self.spec.parts > 1:
            self.shards["part"].add(encoded.tokens, rows)
        else:
            held_out = self._is_held_out(rows)
            self._add("val", encoded, held_out)
            self.held_out += int(held_out.sum())
            self._add("train", encoded, self._is_training(rows, held_out))
        self.next, self.digest, self._halfway = encoded.number + 1, encoded.digest, False
        self.read = encoded.read
        full = any(shards.unnamed for shards in self.shards.values())
        if full or time.monotonic() - self._saved > SECONDS:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Brings everything up to the last block onto the disk; then whole shards get their names."""
        for split, shards in self.shards.items():
            shards.sync()
            self.sealed[split] += plain(shards.unnamed)
            shards.unnamed.clear()
        state = {
            "settings": self.settings,
            "next": self.next,
            "digest": self.digest,
            "read": self.read,
            "counts": asdict(self.counts),
            "loss": self.loss,
            "held_out": self.held_out,
            "shards": {split: shards.state() for split, shards in self.shards.items()},
            "sealed": self.sealed,
        }
        files.write(self.path / CHECKPOINT, json.dumps(state))
        for split in self.splits:
            give_names(self.path, self.sealed[split])
        self._saved = time.monotonic()

    def settle(self) -> None:
        """Before an error or Ctrl-C ends the build: a checkpoint, unless a block is written in part."""
        if self.next and not self._halfway:
            self.checkpoint()

    def finish(self, source: Mapping[str, Any], tokenizer: Mapping[str, Any], code: str) -> dict[str, Any]:
        """Ends the last shards and writes the manifest, which is returned."""
        for shards in self.shards.values():
            shards.seal()
        self.checkpoint()
        if self.spec.parts == 1:
            self.loss.pop("turn", None)
        manifest = {
            "format": FORMAT,
            "code": code,
            "tokenizer": dict(tokenizer),
            "source": dict(source),
            "settings": self.settings,
            "splits": {split: _split(self.sealed[split]) for split in self.splits},
            "counts": asdict(self.counts),
            "first_loss": self.loss or None,
        }
        files.write(self.path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self._clear(manifest)
        return manifest

    def close(self) -> None:
        for shards in self.shards.values():
            shards.close()
        self._lock.close()

    def _take_up(self) -> dict[str, Any] | None:
        """Where an earlier process left the build. RecipeError where its settings were others."""
        if (self.path / MANIFEST).exists():
            done = read_manifest(self.path)
            self._compare(done["settings"], "was built")
            self._clear(done)
            return done
        if not (self.path / CHECKPOINT).exists():
            if found := sorted(self.path.glob("fineweb_*")):
                raise DataError(f"{found[0]}: a shard of another making; name a folder of its own with -o")
            return None
        try:
            state = json.loads(files.read(self.path / CHECKPOINT))
            self._compare(state["settings"], "was begun")
            self.next, self.digest, self.read = state["next"], state["digest"], state["read"]
            self.counts, self.loss = Counts(**state["counts"]), state["loss"]
            self.held_out, self.sealed = state["held_out"], state["sealed"]
            for split in self.splits:
                give_names(self.path, self.sealed[split])
                self.shards[split].restore(state["shards"][split])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path / CHECKPOINT}: damaged; remove the folder and build again") from error
        return None

    def _clear(self, manifest: Mapping[str, Any]) -> None:
        """Removes what only a build on its way needs, and what a killed one left of files that it was writing."""
        for name in (CHECKPOINT, MANIFEST, manifest["tokenizer"]["file"]):
            for path in self.path.glob(f".{glob.escape(name)}.????????"):  # of files.atomic
                path.unlink(missing_ok=True)
        for path in (self.path / CHECKPOINT, *self.path.glob(".fineweb_*.open")):
            path.unlink(missing_ok=True)

    def _compare(self, theirs: Mapping[str, Any], how: str) -> None:
        for name in sorted({*theirs, *self.settings}):
            mine = self.settings.get(name)
            if theirs.get(name) != mine and not _milder(name, theirs.get(name), mine):
                raise RecipeError(
                    f"{self.path}: {how} with {name} = {theirs.get(name)!r}, not {mine!r}; "
                    "say the same again, or name another folder with -o"
                )

    def _is_held_out(self, rows: Rows) -> Mask:
        if self.spec.valid_documents is not None:
            return np.arange(self.held_out, self.held_out + len(rows)) < self.spec.valid_documents
        return (rows[:, KEY] >> np.uint64(16)) / 2.0**48 < self.spec.valid_fraction  # splits.share_of

    def _is_training(self, rows: Rows, held_out: Mask) -> Mask:
        """Whether rows are trained on: not held out, nor held out under another number."""
        training = ~held_out
        if self.spec.valid_documents is None or not training.any():  # by hash, equal documents are on the same side
            return training
        if self._held is None:
            self._held = self._held_keys()
        again = training & np.isin(rows[:, KEY], self._held)
        self.counts += Counts(repeated=int(again.sum()))
        return training & ~again if self.spec.repeated == "leave_out" else training

    def _held_keys(self) -> npt.NDArray[np.uint64]:
        """The keys of all held-out documents, from the sidecars that they were written to."""
        shards = self.shards["val"]
        shards.sync()
        keys = [np.zeros(0, dtype=np.uint64)]
        for row in [*self.sealed["val"], *plain(shards.unnamed)]:
            path = sidecar.path_of(self.path / row["name"])
            keys.append(np.array(sidecar.read(path if path.exists() else hidden(path))[:, KEY]))
        if shards.tokens:
            path = hidden(sidecar.path_of(self.path / f"fineweb_val_{shards.number:06}.bin"))
            keys.append(np.fromfile(path, "<u8", offset=sidecar.HEADER_BYTES).reshape(-1, COLUMNS - 1)[:, KEY])
        return np.unique(np.concatenate(keys))

    def _add(self, split: str, encoded: Encoded, chosen: Mask) -> None:
        if chosen.any():
            self.shards[split].add(*_chosen(encoded.tokens, encoded.rows, chosen))


def _milder(name: str, theirs: Any, mine: Any) -> bool:
    """Whether a setting refuses less than it did: what was refused ended the build, so that nothing done is other."""
    if name == "longest":
        return isinstance(theirs, int) and theirs < mine
    return name in ("lossy", "invalid") and theirs == "refuse"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. DataError where there is none, or it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(files.read(path))
        if manifest["format"] != FORMAT or not isinstance(manifest["splits"], dict):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no manifest of format {FORMAT}; build the folder again") from error
    return dict(manifest)


def _chosen(tokens: Uint16, rows: Rows, chosen: Mask) -> tuple[Uint16, Rows]:
    if chosen.all():
        return tokens, rows
    starts = rows[:, START].astype(np.int64)
    lengths = np.diff(starts, append=len(tokens))
    picked = rows[chosen].copy()
    kept = lengths[chosen]
    picked[:, START] = np.cumsum(kept) - kept
    return tokens[np.repeat(chosen, lengths)], picked


def _split(sealed: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {name: sum(row[name] for row in sealed) for name in ("tokens", "documents", "bytes", "decoded_bytes")}
    return {**sums, "shards": sealed}


def _locked(path: Path) -> IO[bytes]:
    try:
        return folders.locked(path)
    except FairwayError as error:
        why = "another process builds here; wait for it" if "another process" in str(error) else None
        raise RecipeError(f"{path}: {why}" if why else str(error).removeprefix("run folder ")) from error
