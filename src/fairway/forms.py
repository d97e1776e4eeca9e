"""The small forms of a recipe of B6's family: its own difference, on a stand-in for B6 that two cores can train.

`pocket_b6.toml`, beside `b6.toml`, says B6's choices in a laptop's terms, over `pocket.toml` (minutes) or, in the form
`wiki`, over `wiki.toml` (a quarter of an hour). What a recipe changes about B6 is laid over that; values that must
scale (a width, a number of rows) stand in the recipe's own `[pocket]` table, and where wiki needs others again, in
`[wiki]`. Both are laid on top, and mean nothing otherwise.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fairway.base.errors import RecipeError
from fairway.base.recipes import lineage, merge, read

STAND_IN = "pocket_b6.toml"
GIANTS = ("b.toml", "b6.toml")
FORMS = {"pocket": ("pocket",), "wiki": ("pocket", "wiki")}  # the tables that each lays on top, in order


def table(path: Path, form: str) -> dict[str, Any]:
    """The merged table of one of the `FORMS` of the recipe at `path`, which is called pocket_<its name>, or wiki_...

    In order: the stand-in; for b and what extends it without b6, b's own tables; the differences below b6 (or b), the
    eldest first; then their tables. B6 itself is the stand-in as it is. RecipeError outside the family.
    """
    line = lineage(path)
    at = max((i for i, (place, _) in enumerate(line) if place.name in GIANTS), default=None)
    if at is None:
        raise RecipeError(f"{path.name}: extends neither b6.toml nor b.toml: it has no {form} form; leave --{form} out")
    giant, own = line[at]
    merged = _stand_in(giant, form)
    if giant.name == "b.toml":
        merged = _on_top(merged | {"summary": own.get("summary", "")}, giant, own, form)
    for _, difference in line[at + 1 :]:
        merged = merge(merged, difference)
    for place, difference in line[at + 1 :]:
        merged = _on_top(merged, place, difference, form)
    return merged | {"name": f"{form}_{line[-1][1].get('name', path.stem)}"}


def _stand_in(giant: Path, form: str) -> dict[str, Any]:
    path = giant.parent / STAND_IN
    if not path.exists():
        raise RecipeError(f"{path}: not there; a {form} form needs it beside {giant.name}")
    if form == "pocket":
        return read(path)
    choices = lineage(path)[-1][1]  # B6's choices alone, without the laptop's text and shape beneath
    return _on_top(merge(read(giant.parent / f"{form}.toml"), choices), path, choices, form)


def _on_top(merged: dict[str, Any], path: Path, difference: Mapping[str, Any], form: str) -> dict[str, Any]:
    for name in FORMS[form]:
        found = difference.get(name, {})
        if not isinstance(found, Mapping):
            raise RecipeError(f"{path.name}: {name} = {found!r}: a table is expected")
        merged = merge(merged, found)
    return merged
