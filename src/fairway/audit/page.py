"""One page for a folder of submissions: a table of verdicts, and for each submission its rules with their evidence.

The page is one file that needs no network; it is light or dark as its reader's device is, and reads on a telephone.
Whatever a submission says is escaped, and the page runs no script.
"""

from collections.abc import Mapping, Sequence
from html import escape

from fairway.audit.comment import merged
from fairway.audit.verdict import Finding, Report

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --quiet: #646b73; --paper: #fbfbfa; --card: #ffffff; --line: #e2e4e6;
  --violates: #b3261e; --suspect: #8a5a00; --cannot: #4a5a8a; --clean: #1f6f43; --wash: 12%; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --quiet: #9aa1a9; --paper: #15171a; --card: #1d2024;
  --line: #32363c; --violates: #ff8a80; --suspect: #f0b44c; --cannot: #9db2f5; --clean: #76cf9c; --wash: 18%; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
p { margin: .25rem 0; } .quiet { color: var(--quiet); font-size: .9rem; }
.tally { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; padding: 0; list-style: none; }
.tag { display: inline-block; padding: .05rem .55rem; border-radius: 1rem; font-size: .85rem; white-space: nowrap;
  font-weight: 600; color: var(--hue); background: color-mix(in srgb, var(--hue) var(--wash), transparent); }
.violates { --hue: var(--violates); } .suspect { --hue: var(--suspect); }
.cannot-tell { --hue: var(--cannot); } .clean { --hue: var(--clean); }
table { width: 100%; border-collapse: collapse; background: var(--card); border: 1px solid var(--line); }
th, td { text-align: left; vertical-align: top; padding: .45rem .6rem; border-top: 1px solid var(--line); }
th { font-size: .85rem; color: var(--quiet); font-weight: 600; border-top: 0; }
td, code { overflow-wrap: anywhere; } code { font-size: .88em; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
a { color: inherit; }
details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; margin: .75rem 0; }
summary { cursor: pointer; padding: .6rem .8rem; font-weight: 600; overflow-wrap: anywhere; }
details > div { padding: 0 .8rem .8rem; }
.rule { border-left: 3px solid var(--hue); padding: .1rem 0 .1rem .7rem; margin: .7rem 0; }
.rule h3 { font-size: 1rem; margin: 0; } .rule ol { margin: .3rem 0; padding-left: 1.4rem; font-size: .92rem; }
@media (max-width: 40rem) { thead { display: none; } table, tbody, tr, td { display: block; } tr { border-top: 1px solid
  var(--line); padding: .4rem 0; } td { border: 0; padding: .1rem .7rem; } td.number { text-align: left; }
  td[data-name]::before { content: attr(data-name) " "; color: var(--quiet); font-size: .85rem; } }
"""
_ORDER = ("violates", "suspect", "cannot tell", "clean")


def page(reports: Sequence[Report], charges: Mapping[str, str], title: str) -> str:
    """HTML. charges: the one line of each rule, by its id; title: what was audited."""
    numbered = sorted(enumerate(reports), key=lambda each: (_ORDER.index(each[1].verdict), each[1].name))
    rows = "\n".join(_row(number, report) for number, report in numbered)
    parts = "\n".join(_details(number, report, charges) for number, report in numbered)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Audit of {escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Audit of {escape(title)}</h1>
<p class="quiet">Read as text; nothing was executed. "Cannot tell" accuses nobody: something was not followed.</p>
{_tally(reports)}
<table>
<thead><tr><th>verdict</th><th>submission</th><th>rules broken or in doubt</th><th>seconds</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
{parts}
</body>
</html>
"""


def _tally(reports: Sequence[Report]) -> str:
    counts = [(verdict, sum(report.verdict == verdict for report in reports)) for verdict in _ORDER]
    tags = "".join(f"<li>{_tag(verdict, f'{count} {verdict}')}</li>" for verdict, count in counts if count)
    return f'<ul class="tally">{tags}</ul>'


def _tag(verdict: str, says: str = "") -> str:
    return f'<span class="tag {verdict.replace(" ", "-")}">{escape(says or verdict)}</span>'


def _row(number: int, report: Report) -> str:
    shown = [f for verdict in _ORDER[:2] for f in report.rules if f.verdict == verdict]
    unknown = sum(finding.verdict == "cannot tell" for finding in report.rules)
    said = [f"{escape(f.id)}{f' <code>{escape(str(f.place))}</code>' if f.place else ''}" for f in shown]
    said += [f"{unknown} cannot be told"] if unknown else []
    name = f'<a href="#s{number}">{escape(report.name)}</a>'
    seconds = f'<td class="number" data-name="seconds">{escape(str(report.facts.get("seconds") or ""))}</td>'
    return f"<tr><td>{_tag(report.verdict)}</td><td>{name}</td><td>{'<br>'.join(said) or 'none'}</td>{seconds}</tr>"


def _details(number: int, report: Report, charges: Mapping[str, str]) -> str:
    found = merged([f for verdict in _ORDER[:3] for f in report.rules if f.verdict == verdict])
    found += [f for f in report.rules if f.exemption]
    clean = [f for f in report.rules if f.verdict == "clean" and not f.exemption]
    rules = "\n".join(_rule(finding, charges) for finding in found)
    lines = report.facts.get("lines") or {}
    read = ", ".join(f"{name} ({count:,} lines)" for name, count in lines.items()) if isinstance(lines, dict) else ""
    listed = "".join(f"<li><b>{escape(f.id)}</b>: {escape(f.evidence)}</li>" for f in clean)
    rest = f'<summary>clean under {len(clean)} rules</summary><div><ul class="quiet">{listed}</ul></div>'
    begin = " open" if report.verdict == "violates" else ""
    return (
        f'<details id="s{number}"{begin}><summary>{_tag(report.verdict)} {escape(report.name)}</summary><div>\n'
        f'<p class="quiet">{escape(str(report.facts.get("path", "")))}{f"; read: {escape(read)}" if read else ""}</p>\n'
        f"{rules}\n{f'<details>{rest}</details>' if clean else ''}</div></details>"
    )


def _rule(finding: Finding, charges: Mapping[str, str]) -> str:
    place = f" <code>{escape(str(finding.place))}</code>" if finding.place else ""
    way = "".join(f"<li><code>{escape(str(step.place))}</code> {escape(step.what)}</li>" for step in finding.way)
    exempt = f'<p class="quiet">accepted departure: {escape(finding.exemption)}</p>' if finding.exemption else ""
    head = f"<h3>{_tag(finding.verdict)} {escape(finding.id)}{place}</h3>"
    return (
        f'<div class="rule {finding.verdict.replace(" ", "-")}">{head}'
        f"<p>{escape(finding.evidence)}</p>{f'<ol>{way}</ol>' if way else ''}{exempt}"
        f'<p class="quiet">{escape(charges.get(finding.id, ""))} {escape(finding.clause)}</p></div>'
    )
