"""What a run weighs, never estimated: the challenge's sum, and what a decoder really needs."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from fairway.artifact import open_artifact
from fairway.base import files
from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.lab.submit.export import SCORE, TRAIN, Checkout, scripts
from fairway.recipe import Recipe
from fairway.steps import ARTIFACT
from fairway.steps.products import product


@dataclass(frozen=True)
class Weight:
    """Bytes, each by stat(). challenge: training script + artifact; closed: score.py + artifact, which holds the
    tokenizer; sections: of the artifact, in sum artifact_bytes; written: the scripts that were missing and were made
    just now; foreign: whether this is other code than the run's, so that `submit` refuses what it made."""

    run: str
    code_bytes: int
    score_bytes: int
    artifact_bytes: int
    sections: dict[str, int]
    budget_bytes: int
    written: tuple[str, ...]
    foreign: bool

    @property
    def challenge_bytes(self) -> int:
        return self.code_bytes + self.artifact_bytes

    @property
    def closed_bytes(self) -> int:
        return self.score_bytes + self.artifact_bytes

    @property
    def headroom_bytes(self) -> int | None:
        """None where the recipe sets no budget."""
        return self.budget_bytes - self.challenge_bytes if self.budget_bytes else None

    def plain(self) -> dict[str, Any]:
        sums = {name: getattr(self, name) for name in ("challenge_bytes", "closed_bytes", "headroom_bytes")}
        return {**asdict(self), **sums}

    def rows(self) -> list[tuple[str, str, str]]:
        """The table: what, bytes, remark."""
        sections = [(f"  {name}", f"{size:,}", "") for name, size in self.sections.items()]
        room, budget = self.headroom_bytes, f"of {self.budget_bytes:,}"
        remark = (
            "no budget" if room is None else f"{budget}: {room:,} left" if room >= 0 else f"{budget}: {-room:,} over"
        )
        return [
            ("artifact", f"{self.artifact_bytes:,}", ARTIFACT),
            *sections,
            (TRAIN, f"{self.code_bytes:,}", f"trains, quantises, packs and scores; {self._made(TRAIN)}"),
            (SCORE, f"{self.score_bytes:,}", f"opens and scores; {self._made(SCORE)}"),
            ("challenge", f"{self.challenge_bytes:,}", f"{TRAIN} + artifact; {remark}"),
            ("closed", f"{self.closed_bytes:,}", f"{SCORE} + artifact: all that a decoder needs, tokenizer included"),
        ]

    def _made(self, name: str) -> str:
        if name not in self.written:
            return "as it lies there"
        return "written now" + (", by other code than the run's" if self.foreign else "")


def weigh(recipe: Recipe, run: Run, code: Checkout) -> Weight:
    """Weighs a run's scripts and its artifact; a script that is missing is made by `code`, one that is there stays.

    RecipeError where the artifact is not there yet, and where the run booked a script that this code does not make.
    """
    artifact = open_artifact(product(run, ARTIFACT))
    foreign = run.facts.get("code", {}).get("sha256") != code.sha256
    written = _fill_up(recipe, run, code)
    train, score, packed = (run.path(name).stat().st_size for name in (TRAIN, SCORE, ARTIFACT))
    budget = recipe.budget.artifact_bytes
    return Weight(str(run.folder), train, score, packed, artifact.sections, budget, written, foreign)


def _fill_up(recipe: Recipe, run: Run, code: Checkout) -> tuple[str, ...]:
    """Writes the scripts that are missing, and books those that the run never booked; their names."""
    if all(run.path(name).exists() for name in (TRAIN, SCORE)):
        return ()
    missing = {role: pair for role, pair in scripts(recipe).items() if not run.path(pair[0]).exists()}
    booked = run.facts.get("scripts", {})
    for role, (name, script) in missing.items():
        if booked.get(f"{role}_sha256") not in (None, hashlib.sha256(script).hexdigest()):
            raise RecipeError(
                f"{run.path(name)}: is missing, and this code makes another script than the run booked; put that back, "
                f"or check out {run.facts.get('code', {}).get('commit')} and weigh it there"
            )
    new: dict[str, Any] = {}
    for role, (name, script) in missing.items():
        files.write(run.path(name), script)
        if f"{role}_sha256" not in booked:
            new |= {f"{role}_bytes": len(script), f"{role}_sha256": files.sha256(run.path(name))}
    if new:
        run.fact("scripts", **{**booked, **new, "code_sha256": code.sha256})
    return tuple(name for name, _ in missing.values())
