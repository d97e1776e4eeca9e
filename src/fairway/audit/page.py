"""One page for a folder of submissions: a table of verdicts, and for each submission its rules with their evidence.

The page is one file that needs no network; it is light or dark as its reader's device is, and reads on a telephone.
Whatever a submission says is escaped, and the page runs no script.
"""

from collections.abc import Mapping, Sequence
from html import escape

from fairway.audit.comment import merged
from fairway.audit.verdict import Finding, Report
from fairway.base import pages

_STYLE = """
.tally { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; padding: 0; list-style: none; }
.violates { --hue: var(--violates); } .suspect { --hue: var(--suspect); }
.cannot-tell { --hue: var(--cannot); } .clean { --hue: var(--clean); }
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
    body = f"""<h1>Audit of {escape(title)}</h1>
<p class="quiet">Read as text; nothing was executed. "Cannot tell" accuses nobody: something was not followed.</p>
{_tally(reports)}
<table>
{pages.head(("verdict", "submission", "rules broken, in doubt or departed from", "seconds"), ("seconds",))}
<tbody>
{rows}
</tbody>
</table>
{parts}"""
    return pages.page(f"Audit of {title}", body, _STYLE)


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
    said += [
        f'<span class="quiet">accepted: {escape(each.name)}</span>' + (f" <code>{escape(str(at))}</code>" if at else "")
        for f in report.accepted
        for each, at in f.departed()
    ]
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
    exempt = "".join(
        f"<p><b>Accepted departure: {escape(each.name)}</b>{f' <code>{escape(str(at))}</code>' if at else ''}, "
        f"{escape(each.what)} ({escape(each.precedent)}). Read strictly it is a violation.</p>"
        for each, at in finding.departed()
    )
    head = f"<h3>{_tag(finding.verdict)} {escape(finding.id)}{place}</h3>"
    return (
        f'<div class="rule {finding.verdict.replace(" ", "-")}">{head}'
        f"<p>{escape(finding.evidence)}</p>{f'<ol>{way}</ol>' if way else ''}{exempt}"
        f'<p class="quiet">{escape(charges.get(finding.id, ""))} {escape(finding.clause)}</p></div>'
    )
