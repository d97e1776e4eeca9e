"""A place for what can be computed again: every file is named by what it came from and verified by hash on reading."""

import hashlib
import os
from pathlib import Path

from fairway.base import files
from fairway.base.errors import FairwayError


def folder() -> Path:
    """The cache folder: $XDG_CACHE_HOME/fairway, or ~/.cache/fairway."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "fairway"


def load(name: str) -> bytes | None:
    """The content stored under `name`, or None where there is none, or it is not what was written."""
    try:
        content = (folder() / name).read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home folder
        return None
    digest, body = content[:32], content[32:]
    return body if hashlib.sha256(body).digest() == digest else None


def store(name: str, body: bytes) -> None:
    """Keeps `body` under `name`. A cache that cannot be written costs time at the next run and nothing else."""
    try:
        files.write(folder() / name, hashlib.sha256(body).digest() + body)
    except (FairwayError, OSError, RuntimeError):
        return
