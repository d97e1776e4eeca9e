"""What a run weighs, never estimated: the challenge's sum, and what a decoder really needs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fairway.artifact import open_artifact
from fairway.base.journal import Run
from fairway.lab.submit.export import SCORE, TRAIN
from fairway.recipe import Recipe
from fairway.steps import ARTIFACT, Code, export
from fairway.steps.products import product


@dataclass(frozen=True)
class Weight:
    """Bytes, each by stat(). challenge: training script + artifact; closed: score.py + artifact, which holds the
    tokenizer; sections: of the artifact, in sum artifact_bytes; written: whether the scripts were made just now."""

    run: str
    code_bytes: int
    score_bytes: int
    artifact_bytes: int
    sections: dict[str, int]
    budget_bytes: int
    written: bool

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
        made = "written now, from this code" if self.written else "as the run wrote it"
        return [
            ("artifact", f"{self.artifact_bytes:,}", ARTIFACT),
            *sections,
            (TRAIN, f"{self.code_bytes:,}", f"trains, quantises, packs and scores; {made}"),
            (SCORE, f"{self.score_bytes:,}", "opens and scores"),
            ("challenge", f"{self.challenge_bytes:,}", f"{TRAIN} + artifact; {remark}"),
            ("closed", f"{self.closed_bytes:,}", f"{SCORE} + artifact: all that a decoder needs, tokenizer included"),
        ]


def weigh(recipe: Recipe, run: Run, code: Code) -> Weight:
    """Weighs the scripts of a run and its artifact; a run that has no scripts gets those of `code`.

    RecipeError where the artifact is not there yet.
    """
    artifact = open_artifact(product(run, ARTIFACT))
    paths = [run.path(TRAIN), run.path(SCORE)]
    written = not all(path.exists() for path in paths)
    if written:
        export(recipe, run, code)
    train, score = (path.stat().st_size for path in paths)
    return Weight(
        str(run.folder), train, score, _bytes(artifact.path), artifact.sections, recipe.budget.artifact_bytes, written
    )


def _bytes(path: Path) -> int:
    return path.stat().st_size
