"""A thousand broken and mutated scripts through the audit: none may crash it, and what cannot be read is said so.

    python bench/audit_broken.py [--count 1000] [--seed 0] [--workers 2] [BASE ...]

BASE: scripts to mutate (default: this package's own longer files and the tests' small ones). Counted: reports, rules
that failed inside (none is right), unreadable texts without a line (none is right), the slowest and the largest.
"""

import argparse
import ast
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fairway.audit import Report, audit_all  # noqa: E402
from fairway.base.progress import meter  # noqa: E402
from tests.audit.mutations import mutated  # noqa: E402
from tests.audit.test_broken import SCORING  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("bases", nargs="*", type=Path)
    asked = parser.parse_args()
    bases = [path.read_bytes() for path in asked.bases] or [SCORING, *_own()]
    with tempfile.TemporaryDirectory() as name:
        paths = []
        for file, content in mutated(bases, asked.count, asked.seed):
            paths.append(Path(name) / file)
            paths[-1].write_bytes(content)
        started = time.monotonic()
        with meter("audit", len(paths), "files") as shown:
            reports = audit_all(paths, workers=asked.workers, told=lambda done, report: shown.update(done))
        found = _counted(paths, reports)
    found |= {"files": len(paths), "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(found, indent=2))
    raise SystemExit(bool(found["rules that failed"] or found["without a line"] or found["lost"]))


def _own() -> list[bytes]:
    return [
        path.read_bytes() for path in sorted((ROOT / "src" / "fairway").rglob("*.py")) if path.stat().st_size > 9_000
    ]


def _counted(paths: list[Path], reports: list[Report]) -> dict[str, object]:
    failed: Counter[str] = Counter()
    unreadable, pathless, lost, missed = 0, [], [], []
    for path, report in zip(paths, reports, strict=True):
        facts = report.facts
        failed.update(f"{rule}: {why}" for rule, why in facts.get("failed", {}).items())
        if "lines" not in facts:
            lost.append(f"{path.name}: {facts['cannot_read']}")
            continue
        said = next((f for f in report.rules if f.evidence.startswith("cannot read")), None)
        unreadable += said is not None
        if said is not None and path.stat().st_size and not (said.place and said.place.line):
            pathless.append(f"{path.name}: {said.evidence}")
        if said is None and path.suffix == ".py" and _refused(path.read_bytes()):
            missed.append(path.name)
    slowest = max(reports, key=lambda report: float(report.facts["seconds"]))
    return {
        "unreadable": unreadable,
        "without a line": pathless,
        "refused by Python, read by the audit": missed,
        "lost": lost,
        "rules that failed": dict(failed.most_common(20)),
        "slowest": f"{slowest.name}: {slowest.facts['seconds']} s",
        "largest_megabytes": max(int(report.facts.get("peak_bytes", 0)) for report in reports) // 1_000_000,
        "verdicts": dict(Counter(report.verdict for report in reports)),
    }


def _refused(content: bytes) -> bool:
    try:
        ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    return False


if __name__ == "__main__":
    main()
