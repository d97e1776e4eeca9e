"""What is at hand: recipes, techniques, this machine."""

import json as json_text
from dataclasses import asdict

import torch

from fairway import doctor as doctor_checks
from fairway import recipe
from fairway.base import slots
from fairway.base.errors import RecipeError
from fairway.model import GPT, parameter_count
from fairway.recipe import Recipe
from fairway.verbs.printing import table

SLOTS = (
    "data.sources",
    "data.loaders",
    "model.attention",
    "model.mlp",
    "model.embed",
    "train.optim",
    "train.objective",
    "quant.calibration",
    "quant.rounding",
    "artifact.coder",
    "score.windows",
    "score.adapt",
    "score.reshape",
)


def doctor(as_json: bool) -> None:
    checks = doctor_checks.report()
    if as_json:
        print(json_text.dumps([asdict(check) for check in checks], indent=2))
        return
    remarks = ["; ".join(filter(None, (check.found, check.remedy))) for check in checks]
    table("what", "state", [(c.name, c.state, remark) for c, remark in zip(checks, remarks, strict=True)])


def list_recipes(as_json: bool) -> None:
    home = recipe.recipes_folder()
    if home is None:
        raise RecipeError("recipes: no folder of that name here; run from a checkout, or name a .toml file")
    listed = []
    for path in sorted(home.rglob("*.toml"), key=lambda path: (path.parent, path)):
        one = recipe.load(str(path))
        listed.append(
            {
                "name": path.relative_to(home).with_suffix("").as_posix(),  # as every verb takes it
                "params": parameters(one),
                "budget_bytes": one.budget.artifact_bytes,
                "summary": one.summary,
            }
        )
    if as_json:
        print(json_text.dumps(listed, indent=2))
        return
    table("recipe", "parameters", [(str(r["name"]), f"{r['params']:,}", str(r["summary"])) for r in listed])


def list_techniques(as_json: bool) -> None:
    found = {slot: slots.kinds(f"fairway.{slot}") for slot in SLOTS}
    if as_json:
        print(json_text.dumps(found, indent=2))
        return
    table("slot", "", [(slot, "", ", ".join(names)) for slot, names in found.items()])


def parameters(one: Recipe) -> int:
    """The parameters of a recipe's model, counted without allocating it."""
    with torch.device("meta"):
        return parameter_count(GPT(one.model, one.data.tokenizer.vocab))
