"""The tiny way: what every test takes that needs a whole run, or a file that a run left."""

from pathlib import Path

import pytest

from fairway import pipeline
from fairway.base.devices import choose
from fairway.base.journal import Run
from fairway.data import Batches
from fairway.lab.submit import checkout
from fairway.outcome import Outcome
from fairway.recipe import Recipe, load

TINY = Path(__file__).with_name("tiny.toml")
SAMPLE = Path(__file__).parents[1] / "golden" / "sample.txt"


def tiny_recipe(*overrides: str) -> Recipe:
    """The tiny recipe on the committed sample."""
    return load(str(TINY), (f"data.path={SAMPLE}", *overrides))


def run_tiny(folder: Path, *overrides: str) -> Outcome:
    """The tiny recipe, text to score in about two seconds; a folder begun before goes on."""
    with Run(folder) as opened:
        return pipeline.run(tiny_recipe(*overrides), opened, choose("cpu"), checkout())


def interrupt_tiny(folder: Path, step: int, *overrides: str) -> None:
    """Ctrl-C as training asks for the batch of this step."""
    batch = Batches.batch

    def interrupted(self, asked, ranks=None):
        if asked == step:
            raise KeyboardInterrupt
        return batch(self, asked, ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(folder, *overrides)
