"""What a file may ask of who reads it, whatever its checksums say: a few bytes could announce any size. Who writes a
file keeps to the same limits, so that none is written that nobody reads."""

from fairway.base.errors import RecipeError
from fairway.score.spec import ScoreSpec, Stage

MOST_LANES = 1 << 12
MOST_CONTEXT = 1 << 20  # tokens
MOST_WINDOWS = 1 << 22  # of a text: 168 MB of numbers, 67 million tokens in steps of 16
MOST_SEEN = 1 << 18  # tokens whose keys and values all lanes hold: 400 MB on a model of 800 bytes for each
MOST_PASSES = 100  # over the tokens that are learned from


def check(spec: ScoreSpec, stage: Stage, trained_context: int, targets: int, whole: int, lanes: int) -> None:
    """RecipeError where these settings take more memory or time than any honest use of them.

    targets, whole, lanes: see Part.
    """
    context = spec.context or trained_context
    if context > MOST_CONTEXT:
        raise RecipeError(f"context = {context}: at most {MOST_CONTEXT:,} tokens can be decoded")
    if lanes > MOST_LANES:
        raise RecipeError(f"lanes = {lanes}: at most {MOST_LANES:,} can be decoded")
    step = context if stage == "quantized" else min(context, getattr(spec.windows, "stride", context))
    if whole // step > MOST_WINDOWS:
        raise RecipeError(f"{whole:,} tokens in windows of {step}: at most {MOST_WINDOWS:,} windows can be decoded")
    seen = lanes * min(context, -(-targets // lanes))
    if seen > MOST_SEEN:
        raise RecipeError(f"{lanes} lanes at context {context}: at most {MOST_SEEN:,} tokens can be in sight at once")
    if stage == "adapted":
        for name in ("epochs", "steps"):
            if getattr(spec.adapt, name, 0) > MOST_PASSES:
                raise RecipeError(f"adapt.{name} = {getattr(spec.adapt, name)}: at most {MOST_PASSES} can be decoded")
