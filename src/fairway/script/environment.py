"""The environment's names of the challenge's scripts, laid over a recipe's plain table.

SEED · DATA_PATH and TOKENIZER_PATH (where things lie) · VOCAB_SIZE (must be the model's) · MAX_WALLCLOCK_SECONDS (of
training, 0: no limit; what the recipe kept back for calibration stays kept back).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from fairway.base.errors import RecipeError


def overridden(table: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Changes the table in place; {place in the recipe: the new value} of what the environment changes.

    RecipeError for a value that is no number, a vocabulary that is not the model's, and a limit that leaves no time.
    """
    said = {name: environment[name] for name in NAMES if environment.get(name)}
    changed: dict[str, Any] = {}
    for name, text in said.items():
        for place, value in NAMES[name](text, table).items():
            *parents, last = place.split(".")
            inner = table
            for parent in parents:
                inner = inner[parent]
            if inner.get(last) != value:
                inner[last] = changed[place] = value
    return changed


def _seed(text: str, table: dict[str, Any]) -> dict[str, Any]:
    return {"seed": int(_number("SEED", text, whole=True))}


def _vocab(text: str, table: dict[str, Any]) -> dict[str, Any]:
    vocab = int(_number("VOCAB_SIZE", text, whole=True))
    known = table["data"]["tokenizer"]["vocab"]
    if vocab != known:
        raise RecipeError(f"VOCAB_SIZE = {text}: the recipe's model has {known:,} tokens; leave it out, or say {known}")
    return {}


def _seconds(text: str, table: dict[str, Any]) -> dict[str, Any]:
    limit = _number("MAX_WALLCLOCK_SECONDS", text)
    schedule, before = table["train"]["schedule"], table["budget"]["train_seconds"]
    if schedule["by"] == "steps":
        return {"budget.train_seconds": limit}
    if not limit:
        raise RecipeError("MAX_WALLCLOCK_SECONDS = 0: this recipe trains by the clock; name the seconds")
    kept_back = max(before - schedule["seconds"], 0.0) if before else 0.0
    if limit <= kept_back:
        raise RecipeError(
            f"MAX_WALLCLOCK_SECONDS = {text}: {kept_back:g} s of it are kept back for calibration; name more"
        )
    return {"train.schedule.seconds": limit - kept_back, "budget.train_seconds": limit}


def _number(name: str, text: str, whole: bool = False) -> float:
    try:
        value: float = int(text) if whole else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise RecipeError(f"{name} = {text!r}: a{' whole' if whole else ''} number, 0 or more, is expected")
    return value


NAMES: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    "SEED": _seed,
    "DATA_PATH": lambda text, table: {"data.path": text},
    "TOKENIZER_PATH": lambda text, table: {"data.tokenizer.model": text},
    "VOCAB_SIZE": _vocab,
    "MAX_WALLCLOCK_SECONDS": _seconds,
}
