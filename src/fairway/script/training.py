"""The entry of `train_gpt.py`: trains, quantises, packs and scores, with the steps that `fairway run` takes."""

import argparse
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import torch

from fairway import pipeline
from fairway.base.devices import choose
from fairway.base.errors import FairwayError, RecipeError, one_line_errors
from fairway.base.folders import new_folder
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.base.specs import build, to_plain
from fairway.recipe import Recipe
from fairway.script import Arguments, unpacked
from fairway.script.environment import overridden
from fairway.steps import ARTIFACT


class Enough(Exception):
    """As many steps were taken as were asked for."""


class Log(Run):
    """A run that prints its losses, a line for each step that was looked at; `stop`: ends after so many (0: never)."""

    stop = 0

    def point(self, curve: str, step: int, **values: float) -> None:
        super().point(curve, step, **values)
        seconds = values["seconds"]
        self.say(f"step:{step} train_loss:{values['loss']:.6f} train_time:{1e3 * seconds:.0f}ms")
        if self.stop and step >= self.stop:
            raise Enough

    def say(self, text: str) -> None:
        if self.ranks.first:
            print(text, flush=True)


class Script:
    """The code of a run that is one script: itself, weighed where it lies."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def describe(self) -> dict[str, str | None]:
        return {"script": self.path.name, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}

    def write(self, recipe: Recipe, run: Run) -> dict[str, Path]:
        return {"train": self.path}


def main(script: str, table: dict[str, Any], sources: dict[str, str]) -> None:
    """Runs the embedded recipe `table`; exit codes as those of `fairway`."""
    asked = Arguments(description="Trains, quantises, packs and scores: text to score in one script.")
    asked.add_argument("--steps", type=int, default=0, help="end after so many steps of training")
    asked.add_argument("--device", default="auto", help="auto, cpu or cuda")
    asked.add_argument("--runs", type=Path, default=Path("runs"), help="where the run's folder is made")
    with one_line_errors():
        if unpacked(sources):
            return
        said = asked.parse_args()
        if said.steps < 0:
            raise RecipeError(f"--steps {said.steps}: 1 or more are expected; 0: all of them")
        table = to_plain(build(Recipe, table))  # what is said, and what every class says by default
        changed = overridden(table, os.environ)
        ranks = Ranks.start(cuda=said.device != "cpu" and torch.cuda.is_available())
        try:
            _run(build(Recipe, table), changed, Script(Path(script)), said, ranks)
        except Enough:
            pass
        finally:
            ranks.stop()


def _run(recipe: Recipe, changed: dict[str, Any], code: Script, said: argparse.Namespace, ranks: Ranks) -> None:
    folder = Path(ranks.share_text(str(new_folder(said.runs, recipe.name, recipe.seed)) if ranks.first else ""))
    with Log(folder, ranks, quiet=True) as run:
        run.stop = said.steps
        run.say(f"{recipe.name}, seed {recipe.seed}: {folder}")
        for place, value in changed.items():
            run.say(f"environment   {place} = {value!r}")
        run.fact("environment", **changed)
        _, scores = pipeline.make(recipe, run, choose(said.device, ranks.local_rank), code)
        for stage, score in scores.items():
            nats = score.code_length_bits * math.log(2) / score.tokens
            run.say(f"{stage} val_loss:{nats:.8f} val_bpb:{score.bits_per_byte:.8f} time:{1e3 * score.seconds:.0f}ms")
        artifact, weight = run.path(ARTIFACT).stat().st_size, code.path.stat().st_size
        run.say(f"artifact {artifact} bytes, code {weight} bytes, total {artifact + weight} bytes")
        if recipe.score.result not in scores:
            raise FairwayError(f"score.result = {recipe.score.result!r}: not scored")
        run.say(f"final val_bpb:{scores[recipe.score.result].bits_per_byte:.8f} ({recipe.score.result})")
