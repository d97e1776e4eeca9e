"""The pocket form of a recipe of B6's family: its own difference, on a stand-in for B6 that two cores train in minutes.

`pocket_b6.toml`, beside `b6.toml`, has B6's choices in a laptop's data, shape and steps. What a recipe changes about
B6 is laid over it; values that must scale (a width, a number of rows) stand in the recipe's own `[pocket]` table, which
is laid on top and means nothing otherwise.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairway.base.errors import RecipeError
from fairway.base.recipes import lineage, merge, read

STAND_IN = "pocket_b6.toml"
GIANTS = ("b.toml", "b6.toml")


def table(path: Path) -> dict[str, Any]:
    """The merged table of the pocket form of the recipe at `path`, which is called pocket_<its name>.

    In order: the stand-in; for b and what extends it without b6, b's `[pocket]`; the differences below b6 (or b), the
    eldest first; then their `[pocket]` tables. B6 itself is the stand-in as it is. RecipeError outside the family.
    """
    line = lineage(path)
    at = max((i for i, (place, _) in enumerate(line) if place.name in GIANTS), default=None)
    if at is None:
        raise RecipeError(f"{path.name}: extends neither b6.toml nor b.toml: it has no pocket form; leave --pocket out")
    giant, own = line[at]
    if not (giant.parent / STAND_IN).exists():
        raise RecipeError(f"{giant.parent / STAND_IN}: not there; a pocket form needs it beside {giant.name}")
    merged = read(giant.parent / STAND_IN)
    if giant.name == "b.toml":
        merged = merge(merged | {"summary": own.get("summary", "")}, _pocket(giant, own))
    for _, difference in line[at + 1 :]:
        merged = merge(merged, difference)
    for place, difference in line[at + 1 :]:
        merged = merge(merged, _pocket(place, difference))
    return merged | {"name": f"pocket_{line[-1][1].get('name', path.stem)}"}


def _pocket(path: Path, difference: Mapping[str, Any]) -> Mapping[str, Any]:
    found = difference.get("pocket", {})
    if not isinstance(found, Mapping):
        raise RecipeError(f"{path.name}: pocket = {found!r}: a table is expected")
    return found
