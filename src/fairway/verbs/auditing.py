"""Other people's submissions: verdicts as a table, as JSON, as a review, as a page."""

import json as json_text
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fairway.audit.comment import comment as review
from fairway.audit.examine import rule_modules
from fairway.audit.many import audit_all, submissions
from fairway.audit.page import page as paged
from fairway.audit.second import Disagreement, Opinion, disagreements, opinions, strangers
from fairway.audit.verdict import Finding, Report
from fairway.base.errors import RecipeError
from fairway.base.files import write
from fairway.base.progress import meter
from fairway.verbs.bar import bar

_COLOURS = {"violates": "bold red", "suspect": "yellow", "cannot tell": "blue", "clean": "green"}
_ORDER = list(_COLOURS)


def audit(path: Path, strict: bool, comment: bool, second: Path | None, page: Path | None, as_json: bool) -> bool:
    """Prints what was asked for; whether no submission violates a rule."""
    charges = {rule.ID: rule.CHARGE for rule in rule_modules()}
    found = submissions(path)
    if second is not None and len(found) > 1:
        raise RecipeError(f"--second-opinion: {path} holds {len(found)} submissions; name the one that it speaks of")
    others = opinions(second, list(charges)) if second is not None else []
    reports = _audited(found, strict, as_json or comment)
    differing = disagreements(reports[0], others)
    if page is not None:
        write(page, paged(reports, charges, path.resolve().name))
    if as_json:
        print(json_text.dumps(_plain(reports, others, differing, charges, path), indent=2))
    elif comment:
        print("\n\n".join(review(report, charges, differing) for report in reports))
    elif len(reports) == 1:
        _show(reports[0], differing, strangers(others, list(charges)))
    else:
        _show_many(reports)
    if page is not None and not as_json and not comment:
        print(f"page: {page}")
    return all(report.verdict != "violates" for report in reports)


def dynamic(path: Path, name: str, text: Path | None, as_json: bool) -> bool:
    """Runs a submission, sealed, against the instruments; whether it keeps them all."""
    from fairway.audit.dynamic.checks import RUNS, examine

    with meter("audit", RUNS, "runs", as_json, bar=bar) as shown:
        report = examine(path, name, text, told=shown.update)
    if as_json:
        print(json_text.dumps(report.plain(), indent=2))
    else:
        _show(report, (), ())
    return report.verdict != "violates"


def _audited(paths: Sequence[Path], strict: bool, quiet: bool) -> list[Report]:
    with meter("audit", len(paths), "submissions", quiet or len(paths) == 1, bar=bar) as shown:
        return audit_all(paths, strict, told=lambda done, report: shown.update(done))


def _plain(
    reports: Sequence[Report],
    others: Sequence[Opinion],
    differing: Sequence[Disagreement],
    charges: dict[str, str],
    path: Path,
) -> dict[str, object]:
    if len(reports) > 1:
        counts = {verdict: sum(report.verdict == verdict for report in reports) for verdict in _ORDER}
        return {"path": str(path), "counts": counts, "submissions": [report.plain() for report in reports]}
    plain: dict[str, object] = reports[0].plain()
    if others:
        plain["second_opinion"] = {
            "disagreements": [each.plain() for each in differing],
            "unmatched": [{"id": each.id, "verdict": each.verdict} for each in strangers(others, list(charges))],
        }
    return plain


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def _graded(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: (_ORDER.index(finding.verdict), not finding.exemption))


def _show(report: Report, differing: Sequence[Disagreement], unmatched: Sequence[Opinion]) -> None:
    """One submission: its rules, the gravest first, then the ways of what is broken or suspect."""
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("verdict", "rule", "place", "evidence"):
        table.add_column(name, overflow="fold", no_wrap=name in ("verdict", "rule"))
    for finding in _graded(report.rules):
        plain = finding.verdict == "clean" and not finding.exemption
        style, colour = "dim" if plain else "", _COLOURS[finding.verdict]
        evidence = f"{finding.evidence} [{finding.exemption}]" if finding.exemption else finding.evidence
        verdict = f"{finding.verdict} (accepted)" if finding.exemption else finding.verdict
        place = Text(str(finding.place or ""), style)
        table.add_row(Text(verdict, colour), Text(finding.id, style), place, Text(evidence, style))
    console.print(table)
    for finding in _graded(report.rules):
        if finding.way and finding.verdict in ("violates", "suspect"):
            console.print(Text(f"\n{finding.id}: {finding.clause}", "bold"))
            for number, step in enumerate(finding.way, 1):
                console.print(Text(f"  {number}. {step.place}  {step.what}"))
    if report.accepted:
        console.print(
            Text("\nAccepted departures (practice of merged records; --strict makes them violations)", "bold")
        )
    for finding in report.accepted:
        for departure, at in finding.departed():
            console.print(Text(f"  {departure.name} at {at or finding.id}: {departure.what}"))
    for each in differing:
        console.print(Text(f"\n{each.id}: here {each.ours}, there {each.theirs}", "bold"))
        console.print(Text(f"  here:  {each.our_evidence}\n  there: {each.their_evidence or 'no reason given'}"))
    for opinion in unmatched:
        console.print(Text(f"\nthere only: {opinion.id}: {opinion.verdict} {opinion.evidence}"))
    counts = [
        f"{sum(f.verdict == v for f in report.rules)} {v}" for v in _ORDER if any(f.verdict == v for f in report.rules)
    ]
    console.print(Text(f"\n{report.name}: {report.verdict} ({', '.join(counts)})", _COLOURS[report.verdict]))


def _show_many(reports: Sequence[Report]) -> None:
    """A folder of submissions: one line each, the gravest first."""
    console = _console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("verdict", "submission", "broken, in doubt or departed from", "s"):
        table.add_column(name, overflow="fold", no_wrap=name == "verdict", justify="right" if name == "s" else "left")
    for report in sorted(reports, key=lambda each: (_ORDER.index(each.verdict), each.name)):
        said = [
            f"{f.id} {f.place or ''}".strip() for f in _graded(report.rules) if f.verdict in ("violates", "suspect")
        ]
        unknown = sum(finding.verdict == "cannot tell" for finding in report.rules)
        said += [f"{unknown} cannot be told"] if unknown else []
        said += [f"accepted: {d.name} {at or ''}".strip() for f in report.accepted for d, at in f.departed()]
        seconds = f"{report.facts.get('seconds', 0.0):.1f}"
        table.add_row(Text(report.verdict, _COLOURS[report.verdict]), Text(report.name), Text("; ".join(said)), seconds)
    console.print(table)
    counts = [f"{sum(r.verdict == v for r in reports)} {v}" for v in _ORDER if any(r.verdict == v for r in reports)]
    console.print(Text(f"\n{len(reports)} submissions: {', '.join(counts)}"))
