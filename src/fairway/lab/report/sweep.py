"""The page of a sweep, or of any folder of runs: differences with error bars, tables, cost against gain."""

from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePosixPath

from fairway.base import pages
from fairway.base.errors import FairwayError
from fairway.lab.compare import Compared, Comparison, compare, tables
from fairway.lab.compare.approaches import shared
from fairway.lab.compare.tables import remarks
from fairway.lab.finished import read_run
from fairway.lab.report import forest, parts
from fairway.lab.report.pictures import Sheet
from fairway.lab.sweep.book import PLAN, finished, read_facts, read_plan

PAGE = "report.html"
_TITLES = ("Differences", "Tables", "Cost against gain", "Approaches", "Runs")
_KEYS = 16  # of a recipe's differences from the baseline are shown


def sweep_page(folder: Path) -> tuple[str, list[str]]:
    """(HTML, what is missing). Raises what `compare` raises where the folder is no sweep's."""
    planned = (folder / PLAN).exists()
    found, gaps = None, list[str]()
    try:
        found = compare([folder], by="either")
    except FairwayError as error:
        if not planned:
            raise
        gaps.append(f"No comparison: {error}")
    gaps += found.gaps() if found is not None else []
    made = [*(_compared(found, folder) if found is not None else []), parts.section("Runs", _runs(folder))]
    links = parts.contents(made, _TITLES)
    body = (
        f'<h1>{escape(folder.resolve().name)}</h1><p class="quiet">{escape(_summary(found))}</p>'
        f"{_tiles(folder, found)}{links}{parts.missing(gaps)}{''.join(made)}"
    )
    return pages.page(folder.resolve().name, body, parts.STYLE), gaps


def _compared(found: Comparison, folder: Path) -> list[str]:
    with Sheet() as sheet:
        drawn, cost = forest.forest(found, sheet), forest.costs(found, sheet)
    ids = {row.label: f"approach-{number}" for number, row in enumerate(found.rows)}
    sheets = [
        f"<h3>{escape(each.title)}</h3>"
        + parts.table(each.head, [_linked(row, ids) for row in each.rows], each.head[each.words :])
        for each in tables(found)
    ]
    told = "".join(f'<p class="quiet">{escape(line)}</p>' for line in remarks(found))
    approaches = [_approach(row, found.rows[0], ids[row.label], folder) for row in found.rows]
    return [
        parts.section("Differences", drawn),
        parts.section("Tables", '<div class="stack">', *sheets, told, "</div>"),
        parts.section("Cost against gain", f'<div class="grid">{"".join(cost)}</div>' if cost else ""),
        parts.section("Approaches", f'<div class="grid">{"".join(approaches)}</div>'),
    ]


def _linked(row: Sequence[str], ids: dict[str, str]) -> list[str]:
    """A row whose first cell leads to its approach."""
    return [f'<td><a href="#{ids[row[0]]}">{escape(row[0])}</a></td>' if row[0] in ids else row[0], *row[1:]]


def _approach(row: Compared, base: Compared, id_: str, folder: Path) -> str:
    """One approach: what it says of itself, what it changes of the baseline, its runs."""
    run = read_run(Path(row.runs[0]))
    runs = [
        (_link(Path(place), f"seed {seed}", folder), f"{score:.4f}", proof)
        for place, seed, score, proof in zip(row.runs, row.seeds, row.scores, row.proofs, strict=True)
    ]
    changes = "the baseline" if row is base else _changes(shared(run), shared(read_run(Path(base.runs[0]))))
    verdict = row.against.verdict if row.against is not None else "baseline"
    listed = parts.table(("run", "bits per byte", "proof"), runs, ("bits per byte",))
    told = f'<p>{escape(run.recipe.summary)}</p><p class="quiet"><code>{escape(changes)}</code></p>'
    head = f"<summary>{escape(row.label)}: {row.mean:.4f}, {escape(verdict)}</summary>"
    return f'<details id="{id_}" open>{head}<div>{told}{listed}</div></details>'


def _changes(ours: dict[str, object], theirs: dict[str, object]) -> str:
    keys = [
        key
        for key in [*ours, *(key for key in theirs if key not in ours)]
        if key != "name" and ours.get(key) != theirs.get(key)
    ]
    told = ", ".join(f"{key} = {ours[key]}" if key in ours else f"without {key}" for key in keys[:_KEYS])
    return (told or "nothing but the name") + (f", and {len(keys) - _KEYS} more" if len(keys) > _KEYS else "")


def _link(run: Path, says: str, folder: Path) -> str:
    """A cell that leads to the run's own page, where it has one beside this page."""
    if not (run / PAGE).exists() or run.parent.resolve() != folder.resolve():
        return f"<td>{escape(says)}</td>"
    place = PurePosixPath("/", run.name, PAGE).as_uri().removeprefix("file:///")
    return f'<td><a href="{escape(place)}">{escape(says)}</a></td>'


def _runs(folder: Path) -> str:
    """Every planned run and what became of it."""
    failed = {
        str(fact.get("id")): str(fact.get("error", "")) for fact in read_facts(folder) if fact.get("fact") == "failed"
    }
    lines = []
    for one in read_plan(folder):
        score = finished(folder, one)
        state = "finished" if score is not None else "failed" if one.id in failed else "not finished"
        value = score.get("bits_per_byte") if score is not None else None
        shown = f"{value:.4f}" if isinstance(value, float) else ""
        why = failed.get(one.id, "") if score is None else ""
        lines.append((_link(folder / one.folder, one.recipe, folder), str(one.seed), state, shown, why[:300]))
    return (
        parts.table(("recipe", "seed", "state", "bits per byte", ""), lines, ("seed", "bits per byte")) if lines else ""
    )


def _summary(found: Comparison | None) -> str:
    if found is None:
        return "Nothing to compare yet."
    return f"{len(found.rows)} approaches on {found.text_bytes:,} bytes of held-out text, against {found.baseline}."


def _tiles(folder: Path, found: Comparison | None) -> str:
    planned = read_plan(folder)
    done = sum(finished(folder, one) is not None for one in planned)
    tiles = []
    if found is not None:
        best = min(found.rows, key=lambda row: row.mean)
        tiles.append(parts.tile(f"{best.mean:.4f}", f"bits per byte, the least of all: {best.label}"))
        tiles.append(parts.tile(f"{found.rows[0].mean:.4f}", f"bits per byte, the baseline {found.baseline}"))
        verdicts = [row.against.verdict for row in found.rows if row.against is not None]
        for verdict in ("better", "worse"):
            tiles.append(parts.tile(str(verdicts.count(verdict)), f"of {len(verdicts)} approaches {verdict}"))
    if planned:
        tiles.append(parts.tile(f"{done} of {len(planned)}", "runs finished"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""
