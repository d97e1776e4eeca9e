"""One review, ready to paste: verdict, rule lines with their evidence, the record checks that are still open."""

from collections.abc import Mapping, Sequence

from fairway.audit.second import Disagreement
from fairway.audit.verdict import Finding, Report

OPEN = "open: "
"""How the evidence of a record rule begins that had nothing to hold the claims against."""

_HEADS = {
    "violates": "Violates the rules",
    "suspect": "Suspect: a person should look here",
    "cannot tell": "Cannot be told",
    "clean": "No breach found",
}


def comment(report: Report, charges: Mapping[str, str], disagreements: Sequence[Disagreement] = ()) -> str:
    """Markdown. charges: the one line of each rule, by its id."""
    parts = [f"### {_HEADS[report.verdict]}: {_safe(report.name)}", "", _summary(report)]
    for verdict in ("violates", "suspect", "cannot tell"):
        found = [finding for finding in report.rules if finding.verdict == verdict]
        if found:
            parts += ["", f"**{_HEADS[verdict]}**", ""]
            parts += [line for finding in merged(found) for line in _lines(finding, charges)]
    parts += _departures(report.accepted)
    parts += _listed("Record checks still open", [f for f in report.rules if f.evidence.startswith(OPEN)])
    if disagreements:
        parts += ["", "**Where the other review differs**", ""]
        parts += [
            f"- `{each.id}`: here {each.ours} ({_safe(each.our_evidence)}); there {each.theirs}"
            + (f" ({_safe(each.their_evidence)})" if each.their_evidence else "")
            for each in disagreements
        ]
    clean = [finding.id for finding in report.rules if finding.verdict == "clean" and not finding.exemption]
    parts += ["", f"<sub>Clean under {len(clean)} rules: {', '.join(clean)}. Read as text, not executed.</sub>", ""]
    return "\n".join(parts)


def _summary(report: Report) -> str:
    counts = {v: sum(f.verdict == v for f in report.rules) for v in ("violates", "suspect", "cannot tell", "clean")}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    layers = report.facts.get("layers") or []
    read = f"; unpacked on the way: {', '.join(f'`{layer}`' for layer in layers)}" if layers else ""
    return f"Read: `{report.facts.get('script', report.name)}`{read}. {len(report.rules)} rules: {said}."


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """One line for rules that say the same (a file that cannot be read fails them all alike)."""
    by: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by.setdefault((finding.evidence, str(finding.place)), []).append(finding)
    return [group[0] if len(group) == 1 else _together(group) for group in by.values()]


def _together(group: list[Finding]) -> Finding:
    first = group[0]
    ids = ", ".join(finding.id for finding in group)
    return Finding(f"{len(group)} rules", first.verdict, first.evidence, ids, first.place)


def _lines(finding: Finding, charges: Mapping[str, str]) -> list[str]:
    place = f" at `{finding.place}`" if finding.place else ""
    charge = charges.get(finding.id, "")
    lines = [f"- **{finding.id}**{place}: {_safe(finding.evidence)}  ", f"  {_safe(charge)} ({_safe(finding.clause)})"]
    if not charge:
        lines[1] = f"  ({_safe(finding.clause)})"
    if finding.way:
        lines += [f"  {number}. `{step.place}` {_safe(step.what)}" for number, step in enumerate(finding.way, 1)]
    return lines


def _departures(findings: Sequence[Finding]) -> list[str]:
    """What departs from the text of the rules and is accepted practice: which, where, and since when."""
    if not findings:
        return []
    lines = [
        "",
        "**Accepted departures** (practice of merged records; violations only where the rules are read strictly)",
        "",
    ]
    for finding in findings:
        names = ", ".join(f"*{each.name}*{f' at `{place}`' if place else ''}" for each, place in finding.departed())
        lines.append(f"- {names} ({finding.id}): {_safe(finding.evidence)}")
    return lines


def _listed(title: str, findings: list[Finding]) -> list[str]:
    if not findings:
        return []
    rows = [f"- {f.id}: {_safe(f.evidence.removeprefix(OPEN))}" for f in findings]
    return ["", f"**{title}**", "", *rows]


def _safe(text: str) -> str:
    """A submission's words in a review: no tags, nobody is called, no line is broken."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return plain.replace("@", "@\u200b")
