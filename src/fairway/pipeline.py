"""The whole way, in one screen:

    bytes of text -> tokens -> a distribution -> weights -> integers -> one file -> bits per byte

Each step leaves its product in the run folder and takes it up again from there (steps/), so that a run killed at any
moment loses nothing finished.
"""

from fairway import steps
from fairway.base.devices import Device
from fairway.base.journal import Run
from fairway.outcome import Outcome
from fairway.recipe import Recipe
from fairway.score import StageScore
from fairway.score.profile import Keeper
from fairway.steps import Code, Text


def run(recipe: Recipe, run: Run, device: Device, code: Code) -> Outcome:
    """Text to score. Raises what its steps raise: RecipeError, DataError, BudgetError, HonestyError."""
    text, scores = make(recipe, run, device, code, steps.refuse_overlap, Keeper(run))
    proof = steps.prove(recipe, text.held_out, run)  # a slice as a file, decoded by another process: or HonestyError
    return steps.close(recipe, text, scores, proof, run)  # -> score.json


def make(
    recipe: Recipe, run: Run, device: Device, code: Code, check: steps.Check | None = None, keep: Keeper | None = None
) -> tuple[Text, dict[str, StageScore]]:
    """Text to scored file: what an exported script does, too (without the check for shared documents)."""
    steps.begin(recipe, run, device, code)
    text = steps.prepare(recipe, run, check)  # tokenizer, training tokens, held-out tokens
    steps.train(recipe, text, run, device)  # -> weights.safetensors
    steps.calibrate(recipe, text, run, device)  # -> hessians.safetensors; training data is never read again
    steps.quantize(recipe, run, device, code)  # -> integers.safetensors
    steps.pack(recipe, text.tokenizer, run, code)  # -> artifact.fw, weighed with the code; over budget: BudgetError
    return text, steps.score(recipe, text.held_out, run, device, keep)  # from here on only the files speak
