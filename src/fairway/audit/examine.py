"""One submission, every rule: each in a guard, so that a rule that fails costs its own verdict and no other."""

import gc
import importlib
import pkgutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fairway.audit import rules as folder
from fairway.audit.case import Case
from fairway.audit.forked import Aside, LostError, shared
from fairway.audit.reading import Script
from fairway.audit.submission import Submission, opened
from fairway.audit.verdict import Finding, Place, Report, Step

_RECURSION = 5_000  # rules walk trees of 250 levels with several calls for each
_OBJECTS = 50_000  # made between two looks for cycles


def rule_modules() -> list[Any]:
    """Every file of the folder that has an ID and a check, sorted by name."""
    names = sorted(each.name for each in pkgutil.iter_modules(folder.__path__) if not each.name.startswith("_"))
    found = [_loaded(name) for name in names]
    return [module for module in found if hasattr(module, "ID") and hasattr(module, "check")]


def _loaded(name: str) -> Any:
    """One rule's module; one that cannot be imported is a rule that always fails, and says why."""
    try:
        return importlib.import_module(f"{folder.__name__}.{name}")
    except Exception as error:
        why = _reason(error)

        def check(case: Case) -> Finding:
            raise ImportError(why)

        said = "the rule could not be loaded"
        return SimpleNamespace(ID=name.replace("_", "-"), CHARGE=said, CLAUSE=said, check=check, __name__=name)


def audit(path: Path, strict: bool = False, rules: Sequence[Any] | None = None, processes: int = 1) -> Report:
    """The verdicts on a script or a record folder. strict: accepted departures count as violations; processes: among
    how many the work is shared out, this one and others that are forked from it.

    DataError where there is no script at `path`; everything that is wrong inside it is a verdict.
    """
    started = time.monotonic()
    chosen = rule_modules() if rules is None else rules
    with _deep(), _seldom_collected():
        submission = opened(path)
        facts: dict[str, Any] = {"path": str(path), **_read(submission), "rule_seconds": {}, "failed": {}}
        case = Case(submission, strict)
        if submission.entry.tree is None:
            processes = 1  # nothing is worked out
        else:
            _prepared(case, facts, processes)
        findings = _all_checked(chosen, case, facts, processes)
    facts["seconds"] = round(time.monotonic() - started, 3)
    return Report(submission.name, findings, facts)


def _read(submission: Submission) -> dict[str, Any]:
    """What was read, for the report."""
    scripts = [script for each in submission.scripts for script in each.all()]
    unreadable = {script.path: _said(script) for script in scripts if script.unreadable}
    opaque = [f"{script.path}:{gap.line}: {gap.why}" for script in submission.entry.all() for gap in script.opaque]
    return {
        "script": submission.entry.path,
        "layers": [script.path for script in submission.entry.all()][1:],
        "lines": {script.path: script.text.count("\n") + 1 for script in submission.entry.all()},
        "record": submission.record,
        "logs": sorted(submission.logs),
        "bytes": dict(submission.sizes) if len(submission.sizes) <= 40 else sum(submission.sizes.values()),
        "cannot_read": unreadable,
        "opaque": opaque,
    }


def _said(script: Script) -> str:
    assert script.unreadable is not None
    line = script.line(script.unreadable.line)
    return f"{script.path}:{line}: {script.unreadable.why}" if line else f"{script.path}: {script.unreadable.why}"


def _prepared(case: Case, facts: dict[str, Any], processes: int) -> None:
    """What the rules share is computed once, and timed; where that fails, it fails once and each rule is told. The
    trial needs nothing of the trace: both are made at the same time where there are processes."""
    shared_parts = [name for name, value in vars(type(case)).items() if type(value) is cached_property]
    for name in shared_parts:
        if name == _FIRST and processes > 1:
            aside = Aside(lambda: (_computed(case, _AHEAD), case.__dict__[_AHEAD]))
        if name == _AHEAD and processes > 1:
            try:
                said, case.__dict__[name] = aside.result()
                _add(facts, said)
                continue
            except LostError:
                pass  # it is made here
        _add(facts, _computed(case, name))


_FIRST, _AHEAD = "trace", "tried"


def _computed(case: Case, name: str) -> dict[str, dict[str, Any]]:
    """Makes a part of the case; the facts about it."""
    started, failed = time.monotonic(), {}
    try:
        getattr(case, name)
    except Exception as error:  # whatever an unseen script brings about: it is a fact, not a crash
        failed[name] = _reason(error)
        case.__dict__[name] = _Missing(f"{name}: {_reason(error)}")
    return {"rule_seconds": {name: round(time.monotonic() - started, 3)}, "failed": failed}


def _add(facts: dict[str, Any], said: dict[str, dict[str, Any]]) -> None:
    for name, more in said.items():
        facts[name].update(more)


class _Missing:
    """Stands for what could not be computed: every use says why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise LookupError(self._why)


def _all_checked(rules: Sequence[Any], case: Case, facts: dict[str, Any], processes: int) -> tuple[Finding, ...]:
    """The verdicts in the order of the rules. Those that share what takes long are one task; they say so by APART."""
    groups: dict[str, list[int]] = {}
    for n, rule in enumerate(rules):
        groups.setdefault(getattr(rule, "APART", ""), []).append(n)
    last = groups.pop("", [])  # many, and quick
    tasks = [*groups.values(), last]

    def check(task: list[int]) -> tuple[dict[int, Finding], dict[str, dict[str, Any]]]:
        said: dict[str, dict[str, Any]] = {"rule_seconds": {}, "failed": {}}
        found = {n: _checked(rules[n], case, said) for n in task}
        said["failed"] |= {part: _reason(error) for part, error in case.failures.items()}
        return found, said

    found: dict[int, Finding] = {}
    for findings, said in shared([partial(check, task) for task in tasks], processes):
        found |= findings
        _add(facts, said)
    return tuple(found[n] for n in range(len(rules)))


def _checked(rule: Any, case: Case, facts: dict[str, Any]) -> Finding:
    """One rule's verdict, or "cannot tell" with the reason."""
    script, started = case.submission.entry, time.monotonic()
    if script.unreadable and not getattr(rule, "WITHOUT_SCRIPT", False):
        place = Place(script.path, script.line(script.unreadable.line))
        return Finding(rule.ID, "cannot tell", f"cannot read {_said(script)}", rule.CLAUSE, place)
    try:
        finding: Finding = rule.check(case)
    except Exception as error:  # a rule that raises costs its own verdict, never the report
        facts["failed"][rule.ID] = _reason(error)
        finding = Finding(rule.ID, "cannot tell", f"the rule itself failed ({_reason(error)})", rule.CLAUSE)
    facts["rule_seconds"][rule.ID] = round(time.monotonic() - started, 3)
    return _placed(finding, case.submission)


def _placed(finding: Finding, submission: Submission) -> Finding:
    """The same with lines of the files: a notebook's joined cells have lines of their own."""
    books = {script.path: script for script in submission.scripts if script.lines}
    if not books:
        return finding

    def moved(place: Place) -> Place:
        return Place(place.file, books[place.file].line(place.line)) if place.file in books else place

    place = moved(finding.place) if finding.place else None
    way = tuple(Step(moved(step.place), step.what) for step in finding.way)
    return Finding(finding.id, finding.verdict, finding.evidence, finding.clause, place, way, finding.exemption)


def _reason(error: Exception) -> str:
    """One line: the kind, the message, and where it was raised."""
    where, trace = "", error.__traceback__
    while trace is not None:
        where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    said = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {said} at {where}" if said else f"{type(error).__name__} at {where}"


@contextmanager
def _deep() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _RECURSION))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Cycles are looked for every 50,000 objects instead of 700: closures and frames of the trials are held throughout,
    and going through them again and again took an eighth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
