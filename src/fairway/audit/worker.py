"""A process that audits one path after another for `many`: a line of JSON in, a line of JSON out.

For each of them it may hold at most `MEMORY` bytes more than before it, where the machine can say so; what it answers
stands alone on its standard output.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

MEMORY = 500_000_000  # bytes for one submission


def main() -> None:
    from fairway.audit.examine import audit, rule_modules

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that is printed by the way can be taken for an answer
    rules = rule_modules()
    for line in sys.stdin:
        asked = json.loads(line)
        bound(MEMORY)
        answer = _answer(audit, rules, asked)
        answer["last"] = peak_bytes() > MEMORY // 2  # memory is not given back: a fresh process is cheaper
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if answer["last"]:
            return


def _answer(audit: Any, rules: Any, asked: dict[str, Any]) -> dict[str, Any]:
    from fairway.base.errors import FairwayError

    try:
        report = audit(Path(asked["path"]), asked["strict"], rules, asked["processes"]).plain()
    except FairwayError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": f"{asked['path']}: takes more than {MEMORY // 1_000_000} MB to read"}
    report["facts"]["peak_bytes"] = max(peak_bytes(), _peak_beside())
    return dict(report)


def bound(more: int) -> None:
    """Limits this process's memory to what it has now and `more`, in place of an earlier limit: no submission is to be
    cut short by what another has left behind. Does nothing where the system cannot."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    except (ImportError, OSError, ValueError):
        return


def peak_bytes() -> int:
    """The most memory that this process held; 0 where the system does not say. (getrusage would give that of the
    process that started it, where that was more.)"""
    try:
        rows = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith("VmHWM:")), 0)


def _peak_beside() -> int:
    """The same of the largest process that was forked from this one; what both hold together is in each of them."""
    try:
        import resource
    except ImportError:
        return 0
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
