"""The house's one way to make a page: a single HTML file that needs no network and runs no script.

It is light or dark as its reader's device is, and reads on a telephone: what is too wide scrolls inside its own box.
Colours are names (`--ink`, `--accent`, ...), so that a picture drawn with the same names follows the page.
"""

from collections.abc import Sequence
from html import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser that honours it fetches nothing, runs nothing

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #5d646c; --faint: #a9b0b7; --paper: #fbfbfa; --card: #ffffff;
  --line: #e2e4e6; --accent: #1259a7; --violates: #b3261e; --suspect: #8a5a00; --cannot: #4a5a8a; --clean: #1f6f43;
  --wash: 12%; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --quiet: #9aa1a9; --faint: #5f666e; --paper: #15171a;
  --card: #1d2024; --line: #32363c; --accent: #7db4f5; --violates: #ff8a80; --suspect: #f0b44c; --cannot: #9db2f5;
  --clean: #76cf9c; --wash: 18%; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
p { margin: .25rem 0; } .quiet { color: var(--quiet); font-size: .9rem; }
.tag { display: inline-block; padding: .05rem .55rem; border-radius: 1rem; font-size: .85rem; white-space: nowrap;
  font-weight: 600; color: var(--hue); background: color-mix(in srgb, var(--hue) var(--wash), transparent); }
table { width: 100%; border-collapse: collapse; background: var(--card); border: 1px solid var(--line); }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-top: 1px solid var(--line); }
th { font-size: .85rem; color: var(--quiet); font-weight: 600; border-top: 0; }
td, code { overflow-wrap: anywhere; } code { font-size: .88em; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
a { color: inherit; }
details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; margin: .75rem 0; }
summary { cursor: pointer; padding: .6rem .8rem; font-weight: 600; overflow-wrap: anywhere; }
details > div { padding: 0 .8rem .8rem; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """The whole file. title: plain text; body: HTML that its maker has escaped; style: rules of this kind of page."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def head(names: Sequence[str], numbers: Sequence[str] = ()) -> str:
    """A table's heading; the columns that are named in `numbers` stand to the right, as their cells do."""
    cells = (f'<th scope="col"{_right(name in numbers)}>{escape(name)}</th>' for name in names)
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _right(number: bool) -> str:
    return ' class="number"' if number else ""
