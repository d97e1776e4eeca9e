"""The code of a run: what it is, and what it weighs once it is one script."""

import json
from pathlib import Path
from typing import Any, Protocol

from fairway.base import files
from fairway.base.journal import Run
from fairway.recipe import Recipe


class Code(Protocol):
    """What runs: a checkout of the house, which can write itself as scripts, or such a script."""

    def describe(self) -> dict[str, str | None]:
        """Facts for the journal: the commit, where it is known, and a hash."""
        ...

    def write(self, recipe: Recipe, run: Run) -> dict[str, Path]:
        """The scripts for a recipe, in the run folder, by what they do: train (all of it), score (the decoder alone,
        where it is at hand). Called on the rank that writes."""
        ...


def export(recipe: Recipe, run: Run, code: Code) -> int:
    """Writes the scripts and books what each weighs by stat(), and which code made them; the bytes of the training
    script, on every rank."""
    facts: dict[str, Any] = {}
    if run.ranks.first:
        facts["code_sha256"] = code.describe()["sha256"]
        for name, path in code.write(recipe, run).items():
            facts |= {f"{name}_bytes": path.stat().st_size, f"{name}_sha256": files.sha256(path)}
    facts = json.loads(run.ranks.share_text(json.dumps(facts)))
    run.fact("scripts", **facts)
    return int(facts["train_bytes"])
