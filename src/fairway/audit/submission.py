"""What lies in a submission's folder: its scripts, logs, claims and the sizes of its files, read and never executed."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairway.audit import subcommands
from fairway.audit.beside import BYTES
from fairway.audit.reading import Folder, Reader, Script, bounds
from fairway.audit.told import Told, settle
from fairway.base.errors import DataError

_STARTED = re.compile(r"(?:torchrun|python3?|accelerate launch|srun)\b[^\n`;&|]*?\s([\w./-]+\.(?:py|ipynb))\b")
_RESULT = re.compile(r"val_(?:loss|bpb)|\bstep:\d+")
_NO_LOGS = {"requirements.txt", "readme.txt", "license.txt", "notice.txt"}


@dataclass(frozen=True, eq=False)
class Submission:
    """A script, or a record folder.

    root: the folder; name: how it is called in reports
    entry: the script whose score is claimed; its layers hold what it executes and imports
    scripts: every Python text of the folder, the entry first (layers that were unpacked are in their script)
    sizes: bytes by stat() of every file, by its path relative to root (for a lone script: of what it reaches)
    claims: submission.json, or empty; logs: text by path; readme: README.md, or empty; command: run.sh and its like
    record: whether it is a record folder (it claims a score: submission.json or a log lies there)
    flaw: what of the claims could not be read, or ""
    tables: the texts of small JSON files, by path: a command may name one as its settings
    told: the settings that the scripts' trees have by a command or by the logs, and not as they are written
    """

    root: Path
    name: str
    entry: Script
    scripts: tuple[Script, ...]
    sizes: Mapping[str, int]
    claims: Mapping[str, Any]
    logs: Mapping[str, str]
    readme: str = ""
    command: str = ""
    record: bool = False
    flaw: str = ""
    tables: Mapping[str, str] = field(default_factory=dict)
    told: tuple[Told, ...] = ()


def opened(path: Path) -> Submission:
    """A script (.py, .ipynb) or a folder with one. DataError where neither is there."""
    if path.is_file():
        return _lone(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; name a script or a record folder")
    return _folder(path)


def holds_script(folder: Path) -> bool:
    """Whether a folder is a submission itself, not a folder of submissions."""
    try:
        return any(each.suffix in (".py", ".ipynb") and each.is_file() for each in folder.iterdir())
    except OSError:
        return False


def _lone(path: Path) -> Submission:
    reader = Reader(Folder(path.parent))
    entry = reader.script(path.name)
    subcommands.settle([script.tree for script in entry.all() if script.tree is not None])
    reached = {script.path: 0 for script in entry.all() if "!" not in script.path}
    sizes = {name: (path.parent / name).stat().st_size for name in reached}
    scripts = tuple(reader.done[name][0] for name in reached if name in reader.done)
    return Submission(path.parent, path.stem, entry, scripts or (entry,), sizes, {}, {})


def _folder(root: Path) -> Submission:
    sizes = dict(_files(root))
    texts = {name: _text(root / name) for name in sizes if _is_text(name)}
    readme = next((text for name, text in texts.items() if name.lower() in ("readme.md", "readme.txt", "readme")), "")
    command = "\n".join(text for name, text in sorted(texts.items()) if name.endswith(".sh"))
    logs = {name: text for name, text in texts.items() if _is_log(name, text)}
    claims, flaw = _claims(root, sizes)
    scripts = [name for name in sizes if name.endswith((".py", ".ipynb"))]
    if not scripts:
        raise DataError(f"{root}: no Python script here; name a script, a record folder or a folder of these")
    reader = Reader(Folder(root))
    entry = reader.script(_entry(root, scripts, [command, readme, *logs.values()]))
    trees = [script.tree for script in entry.all() if script.tree is not None]
    subcommands.settle(trees)
    told = settle(trees, entry.path, [("README.md", readme), ("run.sh", command)], logs)
    others = [name for name in scripts if name != entry.path]
    read = (entry, *(reader.script(name) for name in sorted(others)[:50]))
    record = bool(claims or flaw or logs)
    tables = {name: _text(root / name) for name, size in sizes.items() if name.endswith(".json") and size <= BYTES}
    name = root.resolve().name
    return Submission(root, name, entry, read, sizes, claims, logs, readme, command, record, flaw, tables, told)


def _files(root: Path) -> Iterator[tuple[str, int]]:
    """Files that git would carry: no hidden ones, no caches, no links that lead out."""
    count = 0
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            path = Path(folder) / name
            if name.startswith(".") or path.is_symlink() or not path.is_file() or count >= bounds.FILES:
                continue
            count += 1
            yield path.relative_to(root).as_posix(), path.stat().st_size


def _is_text(name: str) -> bool:
    return name.lower().endswith((".md", ".sh", ".log", ".txt", ".out", ".jsonl")) or name.lower() == "readme"


def _is_log(name: str, text: str) -> bool:
    if name.rpartition("/")[2].lower() in _NO_LOGS or name.endswith((".md", ".sh")):
        return False
    if name.endswith(".log") or _RESULT.search(text):
        return True
    from fairway.audit.records.log import tells_of_a_run  # the records read submissions

    return tells_of_a_run(text)


def _text(path: Path) -> str:
    """A text within bounds: its head and its tail where it is longer."""
    try:
        with path.open("rb") as file:
            size, half = path.stat().st_size, bounds.LOG_BYTES // 2
            content = file.read(half if size > bounds.LOG_BYTES else bounds.LOG_BYTES)
            if size > bounds.LOG_BYTES:
                file.seek(-half, os.SEEK_END)
                content += b"\n" + file.read(half)
    except OSError:
        return ""
    return content.decode("utf-8", "replace").replace("\r\n", "\n")


def _claims(root: Path, sizes: Mapping[str, int]) -> tuple[dict[str, Any], str]:
    """submission.json, and what is wrong with it."""
    if "submission.json" not in sizes:
        return {}, ""
    try:
        found = json.loads(_text(root / "submission.json"))
    except json.JSONDecodeError as error:
        return {}, f"submission.json:{error.lineno}: {error.msg}"
    except (RecursionError, ValueError) as error:
        return {}, f"submission.json: {error}"
    return (found, "") if isinstance(found, dict) else ({}, "submission.json: holds no table of claims")


def _entry(root: Path, scripts: list[str], texts: list[str]) -> str:
    """train_gpt.py; else what a command starts; else the script that is a program, the largest of several."""
    top = [name for name in scripts if "/" not in name]
    if "train_gpt.py" in top:
        return "train_gpt.py"
    started = [match.rpartition("/")[2] for text in texts for match in _STARTED.findall(text[:200_000])]
    for name in started:
        for script in [*top, *scripts]:
            if script.rpartition("/")[2] == name:
                return script
    named = [name for name in top or scripts if "train" in name or "main" in name]
    return max(named or top or scripts, key=lambda name: (root / name).stat().st_size)
