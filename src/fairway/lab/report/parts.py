"""What pages of runs and of sweeps are made of: sections, tables, bars."""

from collections.abc import Iterable, Sequence
from html import escape

from fairway.base import pages

STYLE = """
body { max-width: 72rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .8rem 0 0; font-size: .9rem; }
nav a { color: var(--accent); text-decoration: none; padding: .3rem 0; }
nav a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.2rem 0 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles div:first-child b { color: var(--accent); }
.tiles span { display: block; color: var(--quiet); font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .75rem; }
.stack td:nth-child(2) { min-width: 11rem; }
.stack > h3 { margin-top: 1.1rem; } .stack > p:first-of-type { margin-top: .8rem; }
.grid > *, .wide { min-width: 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem .8rem; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3rem; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
.wide table { border: 0; background: none; } .wide td, .wide th { overflow-wrap: normal; }
.wide td:first-child { min-width: 4.5rem; } .grid details { margin: 0; }
.wide tr:first-child > td { border-top: 1px solid var(--line); }
tr.chosen td { font-weight: 600; } tr.chosen td:nth-child(2) { color: var(--accent); }
td.bar { min-width: 5rem; width: 30%; vertical-align: middle; }
.wide td:last-child:not(.bar):not(.number) { min-width: 12rem; }
.bar i { display: block; height: .7rem; border-radius: .2rem; background: var(--faint); }
.chosen .bar i { background: var(--accent); }
.over .bar i { background: var(--violates); }
td.heat { background: color-mix(in srgb, var(--accent) var(--heat), transparent); }
.text { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem .9rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .95rem/1.75 ui-monospace, monospace; }
.text span, .scale span { background: color-mix(in srgb, var(--accent) var(--heat), transparent); }
.scale { display: flex; flex-wrap: wrap; gap: .25rem; margin: .5rem 0; font-size: .82rem; }
.scale span { padding: .1rem .5rem; border-radius: .2rem; }
.missing { border-left: 3px solid var(--suspect); padding: .1rem 0 .1rem .8rem; margin: 1rem 0; font-size: .92rem; }
.missing ul { margin: .2rem 0; padding-left: 1.1rem; }
@media (max-width: 30rem) { .wide th, .wide td { padding: .35rem .4rem; font-size: .85rem; } td.bar { min-width: 3rem; }
  figure { padding: .6rem .5rem; } .tiles b { font-size: 1.25rem; } }
.journal td { font-size: .85rem; } .journal code { font-size: .95em; }
"""


def section(title: str, *bodies: str, says: str = "") -> str:
    """A section that a link can lead to; empty where nothing is in it. bodies: HTML; says: a plain sentence."""
    if not any(bodies):
        return ""
    told = f'<p class="quiet">{escape(says)}</p>' if says else ""
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>{told}{"".join(bodies)}</section>'


def anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def contents(sections: Iterable[str], titles: Iterable[str]) -> str:
    """Links to those of the titles that have a section."""
    page = "".join(sections)
    links = [f'<a href="#{anchor(t)}">{escape(t)}</a>' for t in titles if f'<section id="{anchor(t)}">' in page]
    return f'<nav aria-label="sections">{"".join(links)}</nav>'


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = (), chosen: Sequence[int] = ()
) -> str:
    """A table that scrolls sideways where it is too wide. Cells are plain text, or HTML that begins with "<td"; those
    of the columns in `numbers` stand to the right; the rows in `chosen` are the ones that count."""
    body = []
    for at, row in enumerate(rows):
        cells = (
            cell if cell.startswith("<td") else f"<td{_right(name in numbers)}>{escape(cell)}</td>"
            for name, cell in zip(headings, row, strict=True)
        )
        body.append(f"<tr{_CHOSEN if at in chosen else ''}>{''.join(cells)}</tr>")
    inside = f"{pages.head(headings, numbers)}<tbody>{''.join(body)}</tbody>"
    return f'<div class="wide" tabindex="0"><table>{inside}</table></div>'


_CHOSEN = ' class="chosen"'


def bar(share: float) -> str:
    """A cell with a bar of `share` of its width."""
    return f'<td class="bar"><i style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"></i></td>'


def heat(text: str, share: float) -> str:
    """A cell whose ground is the stronger the greater `share` is, from 0 to 1."""
    return f'<td class="number heat" style="--heat:{_percent(share)}">{escape(text)}</td>'


def _percent(share: float) -> str:
    return f"{40 * min(max(share, 0.0), 1.0):.0f}%"  # of accent: beyond 45 % the ink's contrast falls below 4.5


def span(text: str, share: float, title: str) -> str:
    """A stretch of running text, shaded as a cell of `heat` is."""
    return f'<span style="--heat:{_percent(share)}" title="{escape(title)}">{escape(text)}</span>'


def tile(value: str, says: str) -> str:
    return f"<div><b>{escape(value)}</b><span>{escape(says)}</span></div>"


def missing(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    listed = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="missing"><b>Not everything is here</b><ul>{listed}</ul></div>'


def _right(number: bool) -> str:
    return ' class="number"' if number else ""
