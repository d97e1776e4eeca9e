"""The files of a run -> bits per byte."""

from dataclasses import fields
from typing import Any

from fairway.base import files
from fairway.base.devices import Device
from fairway.base.journal import Run
from fairway.data import Tokens
from fairway.recipe import Recipe
from fairway.score.evaluate import StageScore, evaluate
from fairway.score.prices import PRICES
from fairway.steps.products import ARTIFACT, WEIGHTS, product


def score(recipe: Recipe, held_out: Tokens, run: Run, device: Device, keep: Any = None) -> dict[str, StageScore]:
    """Every stage of the recipe, each from a file that it opens itself. keep: a fairway.score.profile.Keeper."""
    found: dict[str, StageScore] = {}
    for stage in recipe.score.stages:
        path = product(run, WEIGHTS if stage == "float" else ARTIFACT)
        booked = run.facts.get(f"score_{stage}", {})
        known = booked.get("artifact_sha256") == files.sha256(path)
        known = known and (stage != recipe.score.result or run.path(PRICES).exists())
        if run.ranks.world == 1 and known and booked["text_sha256"] == held_out.text_sha256:
            found[stage] = booked_score(booked)
        else:
            limit = recipe.budget.eval_seconds if stage == recipe.score.result else 0.0
            found[stage] = evaluate(path, held_out, recipe.score, run, stage, device, limit, keep)
        run.say(f"{stage:<13} {found[stage].bits_per_byte:.4f} bits per byte  ({found[stage].seconds:.1f} s)")
    return found


def booked_score(booked: dict[str, Any]) -> StageScore:
    """A score from its fact in the journal."""
    return StageScore(**{field.name: booked[field.name] for field in fields(StageScore) if field.name in booked})
