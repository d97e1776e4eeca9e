"""What scores must have in common before one may be called better than another."""

from collections.abc import Sequence
from typing import Any

from fairway.base.errors import DataError, RecipeError
from fairway.lab.finished import Finished, whole

RESULT = "result"


def stage_of(run: Finished, stage: str) -> str:
    """The stage of a run that is compared. RecipeError where it was not scored."""
    named = run.recipe.score.result if stage == RESULT else stage
    if f"score_{named}" not in run.facts:
        there = ", ".join(sorted(name.removeprefix("score_") for name in run.facts if name.startswith("score_")))
        raise RecipeError(f"{run.folder}: stage {named} was not scored, but {there}; name one that all runs have")
    return named


def refuse_unlike(runs: Sequence[Finished], stage: str, by: str) -> None:
    """DataError where two scores are of different text, RecipeError where their runs took different numbers of steps
    (unless compared by the clock). Both values stand in the one line."""
    first, clocked = runs[0], by == "either" and all(run.recipe.train.schedule.by == "clock" for run in runs)
    for run in runs[1:]:
        for key, told in (("text_sha256", "scores of different text"), ("text_bytes", "different byte counts")):
            now, then = booked(run, stage)[key], booked(first, stage)[key]
            if now != then:
                raise DataError(
                    f"{run.folder}: {key} = {_short(now)}, but {_short(then)} in {first.folder}; {told} "
                    "are not compared; name runs of one held-out text"
                )
        now, then = steps_of(run), steps_of(first)
        if by != "clock" and not clocked and now != then:
            raise RecipeError(
                f"{run.folder}: trained {now:,} steps, but {then:,} in {first.folder}; compare runs of as many steps, "
                "or say --by clock where the time was what they shared"
            )


def booked(run: Finished, stage: str) -> dict[str, Any]:
    """What the journal says of the compared stage's score."""
    with whole(run.folder):
        row = run.facts[f"score_{stage_of(run, stage)}"]
        _ = float(row["bits_per_byte"]), int(row["text_bytes"]), int(row["tokens"]), float(row["seconds"])
        return row


def steps_of(run: Finished) -> int:
    with whole(run.folder):
        return int(run.facts["train"]["steps"])


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else repr(value)
