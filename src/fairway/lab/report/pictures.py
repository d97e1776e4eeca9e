"""Pictures by matplotlib as inline SVG whose colours are the page's own, so that they are light and dark with it.

A figure is drawn in stand-in colours, one for each name of the page's style; in the SVG they become `var(--name)`.
It is narrow enough to be read on a telephone (374 units), and many of them live in one page: ids are made their own.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from fairway.base.errors import RecipeError

INK, QUIET, FAINT, LINE, ACCENT, CARD = (f"#0{n}0{n}0{n}" for n in range(1, 7))
_NAMES = dict(
    zip((INK, QUIET, FAINT, LINE, ACCENT, CARD), ("ink", "quiet", "faint", "line", "accent", "card"), strict=True)
)
_WIDTH = 5.2  # inches, of 72 units each
_LETTERS = 10.5  # units: 10 pixels on a telephone, 13 in two columns


def plotting() -> Any:
    """matplotlib; a missing extra is one line."""
    try:
        import matplotlib
    except ImportError:
        raise RecipeError(
            "fairway report draws with matplotlib, which is missing: pip install 'fairway[report]'"
        ) from None
    return matplotlib


class Sheet:
    """The pictures of one page; they are drawn inside `with`, in the page's style."""

    def __init__(self) -> None:
        self.style = plotting().rc_context(_STYLE)
        self.count = 0

    def __enter__(self) -> "Sheet":
        self.style.__enter__()
        return self

    def __exit__(self, *about: Any) -> None:
        self.style.__exit__(*about)

    def axes(self, height: float, heights: Sequence[float] = (1.0,)) -> tuple[Any, list[Any]]:
        """A figure of `height` inches, and its panels above one another, which share their x axis."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))
        return figure, [row[0] for row in panels]

    def places(self, most: int) -> Any:
        """Where the marks of an axis stand: at round numbers, at most so many."""
        from matplotlib.ticker import MaxNLocator

        return MaxNLocator(most)

    def picture(self, figure: Any, title: str, says: str, note: str = "") -> str:
        """A figure as HTML. title: its heading; says: what it shows, for those who cannot see it; note: below it."""
        self.count += 1
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        drawn = _inline(buffer.getvalue(), f"p{self.count}-", says)
        below = f'<p class="quiet">{escape(note)}</p>' if note else ""
        return f"<figure><figcaption>{escape(title)}</figcaption>{drawn}{below}</figure>"


def named(axes: Any, says: str) -> None:
    """What a panel shows, and in which unit: above it, where nobody has to turn their head."""
    axes.set_title(says, loc="left", color=QUIET, fontsize=_LETTERS)


def _inline(svg: str, prefix: str, says: str) -> str:
    """The <svg> alone: without its declaration, its style for all the page and ids that nothing refers to; the ids
    that are referred to begin with `prefix`."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, f"var(--{name})")
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    head = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(says)}"><title>{escape(says)}</title>'
    return re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)).strip()


_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's own letters, and readable for those who listen
    "svg.hashsalt": "fairway",  # the same run gives the same page
    "path.simplify_threshold": 0.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelsize": _LETTERS,
    "xtick.labelsize": _LETTERS,
    "ytick.labelsize": _LETTERS,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": _LETTERS,
    "legend.labelcolor": QUIET,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
