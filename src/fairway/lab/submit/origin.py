"""Which code a run comes of, told from its whole journal: facts alone say what was booked last."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.base import folders
from fairway.base.errors import RecipeError
from fairway.base.journal import JOURNAL


@dataclass(frozen=True)
class Origin:
    """code: the fact of the code that trained; makers: hashes of the code that is booked to have made the run's
    scripts, None where a version that did not book it made them."""

    code: dict[str, Any]
    makers: tuple[str | None, ...]

    @property
    def booked(self) -> bool:
        """Whether the code that trained is known to make these scripts."""
        return self.code["sha256"] in self.makers


def origin(folder: Path) -> Origin:
    """RecipeError where other code than that which trained made the scripts, or where the artifact was packed beside
    others. A run that other code went on with is sound as long as that makes the same scripts."""
    trained, packed, exported = _told(folder)
    last = exported[-1]
    found = Origin(trained, tuple({row.get("code_sha256"): 0 for row in exported if _hashes(row) == _hashes(last)}))
    if not found.booked and None not in found.makers:
        raise RecipeError(
            f"{folder}: its scripts were made by code {str(found.makers[-1])[:12]}, and it was trained by "
            f"{named(trained)}; check that out and `fairway pack` the run"
        )
    if packed is not None and _hashes(packed) != _hashes(last):
        raise RecipeError(
            f"{folder}: its artifact was packed by code of other scripts ({packed['train_sha256'][:12]}) than its own "
            f"({last['train_sha256'][:12]}); with {named(trained)} take the artifact away and `fairway pack` the run"
        )
    return found


def named(code: Mapping[str, Any]) -> str:
    """A code's hash, and its commit where it is known."""
    return f"{code['sha256'][:12]} (commit {code['commit']})" if code.get("commit") else str(code["sha256"][:12])


def _told(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None, list[dict[str, Any]]]:
    """(the code that trained, the scripts that the artifact was packed beside, all scripts), as booked.
    KeyError where the journal has no code or no scripts."""
    code: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    packed: dict[str, Any] | None = None
    exported: list[dict[str, Any]] = []
    for row in folders.rows(folder / JOURNAL):
        if row.get("fact") == "code":
            code = row
        elif row.get("fact") == "train":
            trained = code
        elif row.get("fact") == "scripts":
            exported.append(row)
        elif row.get("fact") == "artifact" and exported:
            packed = exported[-1]
    if not trained or not exported:
        raise KeyError("scripts" if trained else "code")
    return trained, packed, exported


def _hashes(scripts: Mapping[str, Any]) -> tuple[str, str]:
    return scripts["train_sha256"], scripts["score_sha256"]
