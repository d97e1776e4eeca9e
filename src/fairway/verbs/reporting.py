"""Pages for people: one file of a run or of a sweep."""

import importlib.util
from pathlib import Path

from fairway.base.errors import RecipeError
from fairway.base.files import write
from fairway.lab.report import PAGE, open_folder, run_page, sweep_page
from fairway.lab.report.folder import is_run
from fairway.verbs.printing import answer, printable


def report(folder: Path, out: Path | None, as_json: bool) -> None:
    """Writes the page, and says where it lies and what it weighs."""
    place = out or folder / PAGE
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder; name a run folder, such as runs/latest, or a sweep's")
    if place.is_dir():
        raise RecipeError(f"{place}: a folder; name the file that the page is written to")
    if is_run(folder):
        opened = open_folder(folder)
        drawn, missing = run_page(opened), list(opened.missing)
    else:
        drawn, missing = sweep_page(folder)
    write(place, drawn)
    facts = {"page": str(place), "bytes": len(drawn.encode()), "missing": missing}
    told = f"; {len(missing)} missing: {missing[0]}" if missing else ""
    answer(facts, printable(f"{place}: {facts['bytes']:,} bytes{told}"), as_json)


def page_of(folder: Path) -> Path | None:
    """The page of a run that has just ended, in its folder; None where the extra is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    write(folder / PAGE, run_page(open_folder(folder)))
    return folder / PAGE
