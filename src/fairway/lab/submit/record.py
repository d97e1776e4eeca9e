"""The record folder as the challenge wants it: scripts, README.md, submission.json, a log for each seed, requirements.

Written whole or not at all: everything is made in a folder beside it, which then takes its name.
"""

import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairway.base import files
from fairway.base.errors import DataError, RecipeError
from fairway.lab.submit import readme
from fairway.lab.submit.entries import SHARED, Entry, entry, same_data, share
from fairway.lab.submit.export import SCORE, TRAIN, needs, requirements

RECORD, README, REQUIREMENTS, OLD = "submission.json", "README.md", "requirements.txt", "superseded"


def submit(
    runs: list[Path],
    folder: Path,
    replaces: Path | None = None,
    bar: float | None = None,
    author: str = "",
    github: str = "",
    update: bool = False,
) -> dict[str, Any]:
    """Makes the record of some finished runs of one recipe, or takes new ones up into one; what submission.json says.

    RecipeError: runs that differ in more than the seed (naming what), also from those that stand in the record; a
    folder that is there without `update`, or none with it; a bar that no score can beat. DataError: what cannot be
    read.
    """
    if not runs:
        raise RecipeError("fairway submit: name finished run folders")
    if bar is not None and not 0 < bar < math.inf:
        raise RecipeError(f"--bar {bar:g}: bits per byte that can be beaten are expected, a number above 0")
    if update != (folder / RECORD).is_file() or (folder.exists() and not update):
        told = "no record there" if update else "exists already"
        raise RecipeError(f"{folder}: {told}; {'leave --update out' if update else 'use --update, or another place'}")
    entries = [entry(path) for path in runs]
    share(entries)
    before = load(folder) if update else {}
    record = _record(entries, before, entry(replaces) if replaces else None, bar, author, github)
    text = readme.rewrite(_kept(folder, before), record) if update else readme.write(record)
    _swap(folder, lambda place: _fill(place, folder, entries, record, before, text))
    return record


def load(folder: Path) -> dict[str, Any]:
    """What submission.json says; DataError where it is no record of ours."""
    try:
        record = dict(json.loads((folder / RECORD).read_bytes()))
        for row in record["runs"]:
            seed, run, artifact = _key(row)
            if not all(isinstance(text, str) for text in (artifact, *(row["sha256"][key] for key in SHARED))):
                raise ValueError("a hash is no text")
            if not isinstance(seed, int) or Path(run).name != run:
                raise ValueError(f"seed {seed!r} and run {run!r} are no number and no folder's name")
        readme.blocks(record)  # what the tables are made of is there, and of the right kind
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{folder / RECORD}: no record of `fairway submit` ({told}); name one that is") from error
    return record


def _kept(folder: Path, before: Mapping[str, Any]) -> str:
    """The README that an update writes again; DataError where it or the log of a standing run cannot be read."""
    for row in before["runs"]:
        if not row["superseded"]:
            files.sha256(folder / log_name(row["seed"]))
    try:
        return files.read(folder / README).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{folder / README}: no UTF-8 text ({error.reason}); save it as UTF-8") from error


def _record(
    entries: list[Entry],
    before: Mapping[str, Any],
    replaces: Entry | None,
    bar: float | None,
    author: str,
    github: str,
) -> dict[str, Any]:
    """The field names of the challenge first, what the tables are made of after them."""
    first = entries[0]
    known = {_key(one.row) for one in entries}
    rows = [_superseded(row, entries) for row in before.get("runs", []) if _key(row) not in known]
    rows += [one.row for one in entries]
    current = [row for row in rows if not row["superseded"]]
    for row in current:
        same_data(f"{first.folder}", first.row, f"{row['run']}, which stands in the record", row)
    replaced = before.get("replaces")
    if replaces is not None:
        replaced = {**replaces.row, "recipe": replaces.table}
    mean = {key: statistics.mean(row[key] for row in current) for key in ("val_loss", "val_bpb")}
    return {
        "author": author or before.get("author", ""),
        "github_id": github or before.get("github_id", ""),
        "name": first.recipe.name,
        "blurb": first.recipe.summary,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "val_loss": mean["val_loss"],
        "val_bpb": mean["val_bpb"],
        "bytes_total": max(row["total_bytes"] for row in current),
        "bytes_code": current[0]["code_bytes"],
        "seeds": [row["seed"] for row in current],
        "std_val_bpb": statistics.stdev(row["val_bpb"] for row in current) if len(current) > 1 else None,
        "bar_bpb": before.get("bar_bpb") if bar is None else bar,
        "params": first.facts["model"]["params"],
        "python": platform.python_version(),
        "recipe": {key: value for key, value in first.table.items() if key != "seed"},
        "replaces": replaced,
        "runs": rows,
    }


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a row another one: a run named twice is one row."""
    return row["seed"], row["run"], row["sha256"]["artifact"]


def _superseded(row: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """An earlier row: it stands as long as its code is the record's, and no new run has its seed."""
    stale = any(one.row["seed"] == row["seed"] for one in entries)
    return {
        **row,
        "superseded": row["superseded"] or stale or row["sha256"]["script"] != entries[0].row["sha256"]["script"],
    }


def _fill(
    place: Path, folder: Path, entries: list[Entry], record: dict[str, Any], before: Mapping[str, Any], text: str
) -> None:
    """text: of README.md."""
    first = entries[0]
    if before:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        old = {_key(row) for row in before["runs"] if not row["superseded"]}
        for seed, run, _ in old - {_key(row) for row in record["runs"] if not row["superseded"]}:
            (place / OLD).mkdir(exist_ok=True)
            (place / log_name(seed)).replace(place / OLD / f"train_seed{seed}-{run}.log")
    for name in (TRAIN, SCORE):
        shutil.copyfile(first.folder / name, place / name)
    (place / README).write_text(text)
    (place / RECORD).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    needed = requirements(needs((first.folder / TRAIN).read_text()) | needs((first.folder / SCORE).read_text()))
    (place / REQUIREMENTS).write_text("\n".join(needed) + "\n")
    for one in entries:
        (place / log_name(one.row["seed"])).write_text(_log(one))


def log_name(seed: int) -> str:
    return f"train_seed{seed}.log"


def _log(one: Entry) -> str:
    """The journal of a run as a log: hashes first, then the losses, then every fact."""
    lines = [f"run {one.row['run']}, recipe {one.recipe.name}, seed {one.recipe.seed}"]
    lines += [f"sha256 {name} {digest}" for name, digest in one.row["sha256"].items()]
    lines += [f"commit {one.row['commit']}", ""]
    lines += [f"step:{step} train_loss:{loss:.6f}" for step, loss in one.curve]
    lines += ["", *(f"fact {name} {json.dumps(values, default=str)}" for name, values in one.facts.items()), ""]
    lines.append(
        f"total {one.row['total_bytes']} bytes: artifact {one.row['artifact_bytes']} + code {one.row['code_bytes']}"
    )
    lines.append(f"final val_loss:{one.row['val_loss']:.8f} val_bpb:{one.row['val_bpb']:.8f} ({one.row['result']})")
    return "\n".join(lines) + "\n"


def _swap(folder: Path, fill: Any) -> None:
    """Makes a folder beside `folder`, fills it, and gives it its name; what was there is gone only then."""
    folder = Path(os.path.abspath(folder))
    made = old = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        made.chmod(0o755)
        fill(made)
        if folder.exists():
            old = made.with_name(f"{made.name}.old")
            folder.rename(old)
        made.rename(folder)
    except OSError as error:
        if old is not None and not folder.exists():
            old.rename(folder)
        raise RecipeError(files.unwritable(folder, error)) from error
    finally:
        for left in (made, old):
            if left is not None and left.exists():
                shutil.rmtree(left, ignore_errors=True)
