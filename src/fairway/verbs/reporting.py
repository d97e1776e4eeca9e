"""Pages for people: one file of a run or of a sweep."""

from pathlib import Path

from fairway.base.errors import RecipeError
from fairway.base.files import write
from fairway.lab.report import open_folder, run_page
from fairway.verbs.printing import answer

PAGE = "report.html"


def report(folder: Path, out: Path | None, as_json: bool) -> None:
    """Writes the page, and says where it lies and what it weighs."""
    place = out or folder / PAGE
    if place.is_dir():
        raise RecipeError(f"{place}: a folder; name the file that the page is written to")
    opened = open_folder(folder)
    drawn, missing = run_page(opened), opened.missing
    write(place, drawn)
    facts = {"page": str(place), "bytes": len(drawn.encode()), "missing": list(missing)}
    line = f"{place}: {facts['bytes']:,} bytes" + (
        f"; {len(missing)} things are missing, named in it" if missing else ""
    )
    answer(facts, line, as_json)
