"""The page of one run."""

from html import escape

from fairway.base import pages
from fairway.lab.report import charts, parts, sections
from fairway.lab.report.charts import NAMES
from fairway.lab.report.curves import number
from fairway.lab.report.folder import Folder
from fairway.lab.report.pictures import Sheet

_TITLES = ("Stages", "Training", "The text", "Bytes", "Budgets", "Quantisation", "A sample", "Journal")


def run_page(folder: Folder) -> str:
    """HTML: all that the run folder holds, and what is missing of it."""
    with Sheet() as sheet:
        training = charts.training(folder, sheet)
        text = [charts.along(folder, sheet), charts.by_length(folder, sheet), charts.gain(folder, sheet)]
    made = [
        parts.section("Stages", sections.stages(folder)),
        parts.section("Training", _grid(training)),
        parts.section("The text", _grid(text), says="Held out: no byte of it was trained on."),
        parts.section(
            "Bytes", _grid(sections.weights(folder)), says="Every file by its size on disk; nothing is estimated."
        ),
        parts.section("Budgets", sections.budgets(folder)),
        parts.section("Quantisation", *sections.quantisation(folder)),
        parts.section("A sample", sections.sample(folder)),
        parts.section("Journal", sections.journal(folder)),
    ]
    title = f"{folder.name}, seed {folder.seed}"
    summary = str(folder.recipe.get("summary") or folder.path.name)
    body = (
        f'<h1>{escape(title)}</h1><p class="quiet">{escape(summary)}</p>'
        f"{_tiles(folder)}{parts.contents(made, _TITLES)}{parts.missing(folder.missing)}{''.join(made)}"
    )
    return pages.page(title, body, parts.STYLE)


def _grid(boxes: list[str]) -> str:
    drawn = "".join(boxes)
    return f'<div class="grid">{drawn}</div>' if drawn else ""


def _tiles(folder: Folder) -> str:
    """The few figures that a reader came for."""
    tiles = []
    score = folder.stages.get(folder.result)
    if score is not None:
        proof = folder.score.get("proof")
        proven = "not proven"
        if isinstance(proof, dict):
            proven = "proven" if proof.get("tokens") == folder.score.get("tokens") else "a slice proven"
        stage = NAMES.get(folder.result, folder.result)
        tiles.append(parts.tile(f"{score:.4f}", f"bits per byte, {stage}, {proven}"))
    size, budget = number(folder.score.get("challenge_bytes")), folder.figure("budget", "artifact_bytes")
    if size is not None:
        tiles.append(parts.tile(f"{size:,.0f}", f"bytes, code and artifact{f', of {budget:,.0f}' if budget else ''}"))
    if (params := number(folder.get("model", "params"))) is not None:
        tiles.append(parts.tile(f"{params:,.0f}", "parameters"))
    seconds = number(folder.get("train", "seconds"))
    trained = folder.curve.seconds if seconds is None else seconds
    if trained:
        tiles.append(parts.tile(f"{trained:,.0f} s", f"of training, {folder.curve.step:,} steps"))
    if (spent := number(folder.get(f"score_{folder.result}", "seconds"))) is not None:
        tiles.append(parts.tile(f"{spent:,.1f} s", "of scoring, from the file alone"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""
