"""The pictures of a sweep: differences from the baseline with their error bars, and what they cost."""

from collections.abc import Callable
from typing import Any

from fairway.lab.compare import Compared, Comparison
from fairway.lab.report.pictures import ACCENT, FAINT, INK, QUIET, Sheet, named
from fairway.lab.statistics import MARGIN

_LONGEST = 26  # letters of a label in a picture
_SMALL = 9.0  # points: its height
_ACROSS = 110.0  # points that a label takes, most of them


def forest(found: Comparison, sheet: Sheet) -> str:
    """Every approach's difference from the baseline, the best at the top, with the intervals of both tests."""
    rows = sorted((row for row in found.rows if row.against is not None), key=_difference, reverse=True)
    if not rows:
        return ""
    figure, (axes,) = sheet.axes(1.3 + 0.3 * len(rows))
    axes.axvline(0, color=QUIET, linewidth=1)
    if bar := _bar(rows):
        axes.axvline(bar, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    drawn = set[str]()
    for at, row in enumerate(rows):
        assert row.against is not None
        documents = row.against.by_document.difference
        if documents is not None:
            axes.plot(
                [documents.low, documents.high],
                [at - 0.22] * 2,
                color=FAINT,
                linewidth=3,
                label=_new(drawn, _BY_DOCUMENT),
            )
        if row.against.welch is not None:
            ends = [row.against.welch.low, row.against.welch.high]
            axes.plot(ends, [at] * 2, color=ACCENT, linewidth=1.6, label=_new(drawn, _BY_SEED))
        axes.plot([row.against.bits_per_byte], [at], "o", color=ACCENT, markersize=5)
    axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel="bits per byte, below zero is better")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.xaxis.set_major_locator(sheet.places(5))
    named(axes, f"against {_short(found.baseline)}")
    if drawn:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.4, -0.6 / figure.get_figheight() - 0.08), ncols=1, handlelength=1.4
        )
    best = rows[-1]
    says = (
        f"Differences from {found.baseline} in bits per byte; the best is {best.label} with {_difference(best):+.4f}."
    )
    dashed = f"Dashed: the challenge's bar, {MARGIN} nats a token better." if bar else ""
    return sheet.picture(figure, "Difference from the baseline", says, dashed)


def costs(found: Comparison, sheet: Sheet) -> list[str]:
    """Gain against each of three costs, a dot for each approach and one for the baseline."""
    return [_cost(found, sheet, *about) for about in _COSTS] if len(found.rows) > 1 else []


def _cost(found: Comparison, sheet: Sheet, title: str, label: str, cost: Callable[[Compared], float]) -> str:
    figure, (axes,) = sheet.axes(3.2)
    places = [(cost(row), -_difference(row)) for row in found.rows]
    for row, place in zip(found.rows, places, strict=True):
        axes.plot(*place, "o", color=INK if row.against is None else ACCENT, markersize=5)
    axes.axhline(0, color=QUIET, linewidth=1)
    axes.margins(x=0.18, y=0.15)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(sheet.places(5))
    named(axes, "gain over the baseline, bits per byte")
    for row, place, up in zip(found.rows, places, _raised(axes, places), strict=True):
        about = {"xytext": (5, 2 + up), "textcoords": "offset points", "fontsize": _SMALL, "color": QUIET}
        axes.annotate(_short(row.label), place, **about)
    says = f"Gain against {label}: " + "; ".join(
        f"{row.label} {-_difference(row):+.4f} at {cost(row):,.1f}" for row in found.rows
    )
    return sheet.picture(figure, title, says)


def _raised(axes: Any, places: list[tuple[float, float]]) -> list[float]:
    """How far each label stands above its dot, in points, so that none lies on another."""
    inches = axes.transData.transform(places) / axes.figure.dpi
    taken: list[tuple[float, float]] = []
    found = [0.0] * len(places)
    for at in sorted(range(len(places)), key=lambda at: float(inches[at][1])):
        x, begun = (float(value) * 72 for value in inches[at])
        y = begun
        while near := [top for left, top in taken if abs(left - x) < _ACROSS and abs(top - y) < _SMALL]:
            y = max(near) + _SMALL
        taken.append((x, y))
        found[at] = y - begun
    return found


_COSTS: tuple[tuple[str, str, Callable[[Compared], float]], ...] = (
    ("Gain against training", "ms a step", lambda row: row.ms_per_step),
    ("Gain against scoring", "seconds of scoring", lambda row: row.score_seconds),
    ("Gain against size", "KB of artifact", lambda row: row.artifact_bytes / 1000),
)
_BY_SEED = "95 % over seeds (Welch)"
_BY_DOCUMENT = "95 % over documents, paired"


def _difference(row: Compared) -> float:
    return row.against.bits_per_byte if row.against is not None else 0.0


def _bar(rows: list[Compared]) -> float | None:
    """The challenge's bar in bits per byte: nats a token and bits per byte of one text differ by a factor."""
    for row in rows:
        if row.against is not None and row.against.nats_per_token:
            return -MARGIN * row.against.bits_per_byte / row.against.nats_per_token
    return None


def _new(drawn: set[str], label: str) -> str:
    """The label the first time, then one that no legend shows."""
    told = "" if label in drawn else label
    drawn.add(label)
    return told or "_"


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
