"""Another reviewer's verdicts, a person's or a model's, beside ours: where they differ, and the evidence of both.

The file is JSON (`{"rules": [{"id": ..., "verdict": ..., "evidence": ...}]}`, a list of such, or `{"id": "verdict"}`),
or lines of text: `rule-id: verdict, because ...`. Every common word for a verdict is understood.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fairway.audit.verdict import Report, Verdict
from fairway.base.errors import DataError
from fairway.base.files import read

WHOLE = "the whole submission"

_WORDS: dict[Verdict, str] = {
    "cannot tell": "cannot tell|can't tell|cannot say|unknown|undecided|inconclusive|not determinable|n/?a",
    "violates": "violat(?:es|ion|ing)|illegal|invalid|fail(?:s|ed)?|flag(?:ged)?|broken|breach(?:es)?|non-?compliant",
    "suspect": "suspect|suspicious|unclear|needs? (?:a )?(?:human|look|review)|warn(?:ing)?|questionable|borderline",
    "clean": "clean|legal|valid|ok(?:ay)?|pass(?:es|ed)?|compliant|fine|no (?:violation|breach|issue)s?(?: found)?",
}
_PATTERNS = {
    verdict: re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.IGNORECASE) for verdict, words in _WORDS.items()
}
_LINE = re.compile(r"^\s*(?:[-*]\s*)?`?([A-Za-z][\w -]{2,60}?)`?\s*[:=|]\s*(.+)$")


@dataclass(frozen=True)
class Opinion:
    """Their verdict under one of our rules, or on the whole."""

    id: str
    verdict: Verdict
    evidence: str = ""


@dataclass(frozen=True)
class Disagreement:
    """ours, theirs: verdicts; evidence on both sides."""

    id: str
    ours: Verdict
    theirs: Verdict
    our_evidence: str
    their_evidence: str

    def plain(self) -> dict[str, str]:
        return {
            "id": self.id,
            "ours": self.ours,
            "theirs": self.theirs,
            "our_evidence": self.our_evidence,
            "their_evidence": self.their_evidence,
        }


def opinions(path: Path, ids: Sequence[str]) -> list[Opinion]:
    """What the other reviewer says. DataError where the file holds no verdict that can be understood."""
    text = read(path).decode("utf-8", "replace")
    try:
        rows = list(_of_json(json.loads(text)))
    except json.JSONDecodeError as error:
        if text.lstrip().startswith(("{", "[")):
            raise DataError(
                f"{path}:{error.lineno}: no JSON ({error.msg}); mend it or write `rule: verdict` lines"
            ) from error
        rows = list(_of_lines(text))
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply; write `rule: verdict` lines") from error
    found = [Opinion(_rule(name, ids), verdict, said) for name, verdict, said in rows]
    if not found:
        raise DataError(
            f"{path}: no verdict found; write lines such as `{ids[0] if ids else 'rule'}: violates, because`"
        )
    return found


def disagreements(report: Report, others: Sequence[Opinion]) -> list[Disagreement]:
    """Where both speak and differ; a verdict on the whole is held against ours on the whole."""
    ours = {
        finding.id: (finding.verdict, _evidence(finding.evidence, str(finding.place or ""))) for finding in report.rules
    }
    worst = next((f for f in report.rules if f.verdict == report.verdict), None)
    ours[WHOLE] = (report.verdict, _evidence(worst.evidence, str(worst.place or "")) if worst else "")
    both = [(each, ours[each.id]) for each in others if each.id in ours]
    return [
        Disagreement(each.id, verdict, each.verdict, evidence, each.evidence)
        for each, (verdict, evidence) in both
        if verdict != each.verdict
    ]


def strangers(others: Sequence[Opinion], ids: Sequence[str]) -> list[Opinion]:
    """What they say under names that are none of our rules."""
    return [each for each in others if each.id not in (*ids, WHOLE)]


def _evidence(evidence: str, place: str) -> str:
    return f"{place}: {evidence}" if place else evidence


def _of_json(found: Any) -> Iterator[tuple[str, Verdict, str]]:
    """(name, verdict, evidence) of every verdict in a JSON document."""
    if isinstance(found, list):
        for row in found:
            yield from _of_row(row)
    elif isinstance(found, dict):
        listed = next((found[key] for key in ("rules", "findings", "verdicts", "results") if key in found), None)
        if isinstance(listed, (list, dict)):
            yield from _of_json(listed)
        for key, value in found.items():
            if isinstance(value, str) and (verdict := verdict_of(value)):
                yield (WHOLE if key in ("verdict", "overall", "conclusion") else str(key)), verdict, ""
            elif isinstance(value, dict) and value is not listed:
                yield from _of_row({"id": key, **value})


def _of_row(row: Any) -> Iterator[tuple[str, Verdict, str]]:
    if not isinstance(row, dict):
        return
    name = next((row[key] for key in ("id", "rule", "name", "check") if isinstance(row.get(key), str)), WHOLE)
    said = next((row[key] for key in ("verdict", "status", "result") if isinstance(row.get(key), str)), "")
    verdict = verdict_of(said)
    if verdict:
        evidence = next((row[k] for k in ("evidence", "reason", "comment", "why") if isinstance(row.get(k), str)), "")
        yield name, verdict, evidence


def _of_lines(text: str) -> Iterator[tuple[str, Verdict, str]]:
    for row in text.splitlines():
        match = _LINE.match(row)
        if match and (verdict := verdict_of(match[2])):
            name = match[1].strip()
            yield (WHOLE if name.lower() in ("verdict", "overall", "conclusion") else name), verdict, match[2].strip()


def verdict_of(said: str) -> Verdict | None:
    """The verdict that some words give: the first that they name."""
    found = [(match.start(), -len(match[0]), v) for v, pattern in _PATTERNS.items() if (match := pattern.search(said))]
    return min(found)[2] if found else None


def _rule(name: str, ids: Sequence[str]) -> str:
    """Our rule of this name, or of nearly this name; the name as it stands where there is none."""
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    return next(iter(get_close_matches(plain, ids, n=1, cutoff=0.85)), name)
