"""The audit over a corpus of submissions whose faults are known: what is found, what is missed, who is accused wrongly.

    python bench/audit.py CORPUS [--list] [--only TEXT] [--workers 2] [--json FILE]

CORPUS is a part in its short form (tests/audit/corpus/tuning: it is built first) or a built folder with its cases.toml.
A fault counts as found where its rule, or one that the case names as fair too, says "violates"; as found in its place
where that verdict stands within 10 lines of a line at fault. "suspect" is counted apart and is no finding. A clean case
is accused where any rule says "violates". Disputed cases (accepted departures) must not be accused, and must be with
--strict, which is run on them alone.
"""

import argparse
import collections
import dataclasses
import importlib.util
import itertools
import json
import sys
import tempfile
import tomllib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fairway.audit import Finding, Report, audit_all
from fairway.audit.examine import rule_modules
from fairway.verbs.bar import bar

MAKER = Path(__file__).parents[1] / "tests" / "audit" / "corpus" / "make.py"
NEAR = 10  # lines
SECONDS = 300.0  # for one case: a loaded machine must not turn a verdict into "cannot tell"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One case and what the audit made of it.

    state: of a fault: found, elsewhere (right rule, wrong place), suspect, cannot tell, missed; of a clean or disputed
    case: clean, suspect, cannot tell, accused. wrong: accusations by rules that have nothing to do with it.
    """

    case: dict[str, Any]
    report: Report
    state: str
    wrong: tuple[Finding, ...]
    strict: str = ""  # of a disputed case: accused or spared

    @property
    def kind(self) -> str:
        if self.case.get("violates"):
            return "fault"
        return "opaque" if self.case.get("cannot") else "disputed" if self.case.get("exempt") else "clean"

    @property
    def fails(self) -> bool:
        right = {"fault": ("found",), "opaque": ("cannot tell",), "clean": ("clean", "suspect")}
        good = self.state in right.get(self.kind, ("clean", "suspect")) and self.strict != "spared"
        return not good or bool(self.wrong)


def built(part: Path, into: Path) -> Path:
    """The folder with cases.toml: the part itself, or what its short form makes."""
    if (part / "cases.toml").is_file():
        return part
    spec = importlib.util.spec_from_file_location("corpus_make", MAKER)
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = maker
    spec.loader.exec_module(maker)
    if not maker.make(part, into):
        raise SystemExit(f"{part}: no cases here; name a folder with *.cases files or a cases.toml")
    return into


def near(finding: Finding, places: Sequence[dict[str, Any]]) -> bool:
    """Whether a verdict's place is one of the places at fault, in the file or in what was unpacked out of it."""
    at = finding.place
    if at is None:
        return False
    return any(at.file.split("!")[0] == p["file"] and abs(at.line - p["line"]) <= NEAR for p in places)


def judged(case: dict[str, Any], report: Report, strict: Report | None) -> Outcome:
    asked = {*case.get("violates", []), *case.get("acceptable", []), *case.get("cannot", [])}
    exempt = set(case.get("exempt", []))
    spared = asked | set(case.get("may", []))
    wrong = tuple(f for f in report.rules if f.verdict == "violates" and f.id not in spared)
    if case.get("violates") or case.get("cannot"):
        return Outcome(case, report, fault_state(case, report, asked, exempt), wrong)
    state = "accused" if wrong else report.verdict if report.verdict != "violates" else "clean"
    if strict is None:
        return Outcome(case, report, state, wrong)
    told = any(f.verdict == "violates" and f.id in exempt for f in strict.rules)
    return Outcome(case, report, state, wrong, "accused" if told else "spared")


def fault_state(case: dict[str, Any], report: Report, asked: set[str], exempt: set[str]) -> str:
    if case.get("cannot"):
        return "cannot tell" if any(f.id in asked and f.verdict != "clean" for f in report.rules) else "missed"
    told = [f for f in report.rules if f.id in asked]
    hits = [f for f in told if f.verdict == "violates" or (f.id in exempt and (f.exemption or f.verdict == "suspect"))]
    if hits:
        return "found" if any(near(f, case["places"]) for f in hits) else "elsewhere"
    return next((v for v in ("suspect", "cannot tell") if any(f.verdict == v for f in told)), "missed")


def run(folder: Path, only: str, workers: int) -> list[Outcome]:
    cases = tomllib.loads((folder / "cases.toml").read_text(encoding="utf-8"))["case"]
    cases = [case for case in cases if only in case["name"]]
    cases.sort(key=lambda case: zlib.crc32(case["name"].encode()))  # mixed, so that half a run says something too
    disputed = [case for case in cases if case.get("exempt") and not case.get("violates")]

    by_name = {case["name"]: case for case in cases}
    with bar("audit", len(cases) + len(disputed), "cases") as watched:
        counter = itertools.count(1)

        def told(_: int, report: Report) -> None:
            watched.update(next(counter))
            one = judged(by_name[Path(report.facts["path"]).name], report, None)
            if one.fails and not sys.stderr.isatty():  # a long run's log shows at once what fails
                print(f"{one.case['name']}: {one.state} {[f.id for f in one.wrong]}", file=sys.stderr, flush=True)

        reports = audit_all([folder / case["name"] for case in cases], workers=workers, seconds=SECONDS, told=told)
        stern_paths = [folder / case["name"] for case in disputed]
        again = audit_all(stern_paths, strict=True, workers=workers, seconds=SECONDS, told=lambda _, __: None)
    stern = {case["name"]: report for case, report in zip(disputed, again, strict=True)}
    return [judged(case, report, stern.get(case["name"])) for case, report in zip(cases, reports, strict=True)]


def share(part: int, whole: int) -> str:
    return f"{part}/{whole} ({100 * part / whole:.1f} %)" if whole else "none"


def figures(outcomes: list[Outcome]) -> dict[str, Any]:
    faults, clean = ([o for o in outcomes if o.kind == kind] for kind in ("fault", "clean"))
    disputed = [o for o in outcomes if o.kind == "disputed"]
    rules = sum(1 for o in outcomes for f in o.report.rules)
    unsure = sum(1 for o in outcomes for f in o.report.rules if f.verdict == "cannot tell")
    right = sum(o.state in ("found", "elsewhere") for o in faults)
    false = sum(len(o.wrong) for o in outcomes)
    seconds = sorted(o.report.facts.get("seconds", 0.0) for o in outcomes)
    return {
        "recall, right rule": share(right, len(faults)),
        "recall, right rule and place": share(sum(o.state == "found" for o in faults), len(faults)),
        "faults only suspected": share(sum(o.state == "suspect" for o in faults), len(faults)),
        "faults under which the rule cannot tell": share(sum(o.state == "cannot tell" for o in faults), len(faults)),
        "precision (cases rightly accused of all accusations)": share(right, right + false),
        "faults with a wrong accusation besides": share(sum(bool(o.wrong) for o in faults), len(faults)),
        "clean cases accused": share(sum(bool(o.wrong) for o in clean), len(clean)),
        "clean cases suspected": share(sum(o.state == "suspect" for o in clean), len(clean)),
        "clean cases: cannot tell": share(sum(o.state == "cannot tell" for o in clean), len(clean)),
        "disputed cases accused": share(sum(bool(o.wrong) for o in disputed), len(disputed)),
        "disputed cases accused when strict": share(sum(o.strict == "accused" for o in disputed), len(disputed)),
        "opaque cases told as such": share(
            *(sum(o.kind == "opaque" and o.state in states for o in outcomes) for states in (("cannot tell",), STATES))
        ),
        "verdicts that cannot tell": share(unsure, rules),
        "seconds, median and most": f"{seconds[len(seconds) // 2]:.2f} and {seconds[-1]:.2f}" if seconds else "none",
    }


STATES = ("cannot tell", "missed")


def by_rule(outcomes: list[Outcome]) -> Table:
    table = Table(box=None, header_style="bold")
    columns = ("rule", "cases", "found", "elsewhere", "suspect", "cannot tell", "missed", "wrongly accuses", "unsure")
    for name in columns:
        table.add_column(name, justify="left" if name == "rule" else "right")
    there = {rule.ID for rule in rule_modules()}
    named = {rule for o in outcomes for rule in o.case.get("violates", [])} | there
    for rule in sorted(named):
        mine = [o for o in outcomes if rule in o.case.get("violates", [])]
        count = collections.Counter(o.state for o in mine)
        wrong = sum(f.id == rule for o in outcomes for f in o.wrong)
        unsure = sum(f.id == rule and f.verdict == "cannot tell" for o in outcomes for f in o.report.rules)
        numbers = (len(mine), *(count[c] for c in columns[2:7]), wrong, unsure)
        table.add_row(rule if rule in there else f"{rule} (no such rule)", *(str(n) if n else "" for n in numbers))
    return table


def failures(outcomes: list[Outcome]) -> str:
    """What does not come out as it must, one paragraph a case (Markdown)."""
    lines = []
    for o in (o for o in outcomes if o.fails):
        want = ", ".join(o.case.get("violates") or o.case.get("cannot") or ["nothing"])
        lines.append(f"- **{o.case['name']}** ({o.kind}, wants {want}): {o.state}. {o.case.get('style', '')}")
        if o.strict == "spared":
            lines.append(f"    - not accused when strict of any of {', '.join(o.case['exempt'])}")
        asked = {*o.case.get("violates", []), *o.case.get("acceptable", []), *o.case.get("cannot", [])}
        unsure = [f for f in o.report.rules if f.verdict == "cannot tell" == o.state][:3]  # more say the same
        for f in o.report.rules:
            if f in o.wrong or (f.id in asked and o.state != "found") or f in unsure:
                said = "WRONG " if f in o.wrong else ""
                lines.append(f"    - {said}{f.id}: {f.verdict} at {f.place}: {f.evidence[:300]}")
        if o.state in ("elsewhere", "missed"):
            where = sorted({f"{p['file']}:{p['line']}" for p in o.case.get("places", [])})
            lines.append(f"    - at fault: {', '.join(where[:6])}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--list", action="store_true", help="every case that fails, with the verdicts")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the figures and each case's outcome, here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        outcomes = run(built(asked.corpus, Path(room)), asked.only, asked.workers)
    console = Console(width=160)
    console.print(by_rule(outcomes))
    numbers = figures(outcomes)
    for name, number in numbers.items():
        console.print(f"{name}: {number}", highlight=False)
    if asked.list:
        print("\n" + failures(outcomes))
    if asked.json:
        plain = [{"name": o.case["name"], "state": o.state, "wrong": [f.id for f in o.wrong]} for o in outcomes]
        asked.json.write_text(json.dumps({"figures": numbers, "cases": plain}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
