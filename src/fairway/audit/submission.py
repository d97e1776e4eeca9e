"""What lies in a submission's folder: its scripts, logs, claims and the sizes of its files, read and never executed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.audit.reading.script import Script


@dataclass(frozen=True)
class Submission:
    """A script, or a record folder.

    root: the folder; name: how it is called in reports
    entry: the script whose score is claimed; its layers hold what it executes and imports
    scripts: every Python text of the folder, the entry first (layers that were unpacked are in their script)
    sizes: bytes by stat() of every file, by its path relative to root (for a lone script: of what it reaches)
    claims: submission.json, or empty; logs: text by path; readme: README.md, or empty; command: run.sh and its like
    record: whether it is a record folder (it claims a score: submission.json or a log lies there)
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
