"""A size that leaves the code out, is held against MiB, or disagrees with the files."""

from dataclasses import replace

from fairway.audit.case import Case
from fairway.audit.exemptions import departure
from fairway.audit.records import Record, record_of
from fairway.audit.records.second_files import second_file
from fairway.audit.records.sums import LIMIT, MIB, Sum, squeezed, sums
from fairway.audit.verdict import Finding, Place, Verdict

ID = "size-sum"
CHARGE = "The size is not code plus artifact within 16,000,000 bytes."
CLAUSE = "R1: code bytes + compressed model bytes <= 16,000,000, decimal"


def check(case: Case) -> Finding:
    """The folder's numbers first, then the sum that the script itself makes."""
    record = record_of(case.submission)
    found = _written(case, record)
    checks = (_over, _without_code, _claimed, _weighed, _less_than_files, _of_another_size)
    found += [each for check_ in checks if (each := check_(record))]
    if found:
        first = next((each for each in found if each.verdict == "violates"), found[0])
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return Finding(ID, first.verdict, first.evidence + more, CLAUSE, first.place)
    return _packed(case, record) or Finding(ID, "clean", _said(record), CLAUSE)


def _over(record: Record) -> Finding | None:
    """A logged or claimed sum above the limit."""
    sums_ = [(log.total.value, Place(log.path, log.total.line)) for log in record.logs if log.total]
    sums_ += [(record.claims.total, record.claims.at(record.claims.total))] if record.claims.total else []
    over = [(value, place) for value, place in sums_ if value > LIMIT]
    if not over:
        return None
    value, place = max(over, key=lambda each: each[0])
    unit = ", which is under 16 MiB but not under 16 MB" if value <= MIB else ""
    return Finding(
        ID, "violates", f"{place.file} gives {value:,.0f} bytes, and the limit is 16,000,000{unit}", CLAUSE, place
    )


def _without_code(record: Record) -> Finding | None:
    """A sum that equals the model alone."""
    code = f"{record.code_bytes:,} bytes"
    for log in record.logs:
        models = {model.value for model in log.models}
        if log.total and log.total.value in models:
            evidence = (
                f"{log.path}: the total of {log.total.value:,.0f} bytes is the model alone, without {code} of code"
            )
            return Finding(ID, "violates", evidence, CLAUSE, Place(log.path, log.total.line))
    total, claims = record.claims.total, record.claims
    logged = any(log.total and log.total.value == total for log in record.logs)
    if not total or total not in (claims.model, claims.artifact) or (logged and total != claims.model):
        return None
    evidence = (
        f"submission.json claims {total:,.0f} bytes in all and for the artifact alike: {code} of code are left out"
    )
    verdict: Verdict = "suspect"  # the whole may be called an artifact
    if total == claims.model:
        verdict = "violates" if claims.code is not None else _judged(total + record.code_bytes)
    return Finding(ID, verdict, evidence, CLAUSE, record.claims.at(total))


def _claimed(record: Record) -> Finding | None:
    """A claimed sum against the logged ones."""
    total = record.claims.total
    logged = [(log.total.value, log.codes[-1].value if log.codes else 0.0) for log in record.logs if log.total]
    if not total or not logged or any(abs(total - value) < 1 for value, _ in logged):
        return None
    less = [(value, code) for value, code in logged if code and abs(total - (value - code)) < 1]
    if less:
        value, code = less[0]
        evidence = f"submission.json claims {total:,.0f} bytes, the logged {value:,.0f} less the code's {code:,.0f}"
        return Finding(ID, _judged(value), evidence, CLAUSE, record.claims.at(total))
    if total < min(value for value, _ in logged) - 1:
        low = min(value for value, _ in logged)
        evidence = f"submission.json claims {total:,.0f} bytes, and the logs give {low:,.0f} at least"
        return Finding(ID, _judged(max(value for value, _ in logged)), evidence, CLAUSE, record.claims.at(total))
    return None


def _weighed(record: Record) -> Finding | None:
    """The files themselves: the artifact where it lies in the folder, else the largest that a log gives."""
    largest = max(record.artifacts.items(), key=lambda each: each[1], default=None)
    logged = [(model.value, Place(log.path, model.line)) for log in record.logs if log.total for model in log.models]
    logged = [(value, place) for value, place in logged if value < LIMIT]
    models = [(float(largest[1]), Place(largest[0]))] if largest else logged
    if not models or _is_packed(record):
        return None
    model, place = max(models, key=lambda each: each[0])
    total = model + record.code_bytes + sum(record.neighbours.values())
    if total <= LIMIT:
        return None
    evidence = (
        f"{record.code_bytes + sum(record.neighbours.values()):,} bytes of code by stat() and {model:,.0f} bytes of "
        f"artifact make {total:,.0f}, over 16,000,000"
    )
    claimed = record.claims.at(record.claims.total) if record.claims.total else None
    logged_at = next((Place(log.path, log.total.line) for log in record.logs if log.total), place)
    return Finding(ID, "violates", evidence, CLAUSE, claimed or logged_at)


def _less_than_files(record: Record) -> Finding | None:
    """A claimed sum that is less than the script and the artifact that lies here, where a log tells of this one."""
    total, told = record.claims.total, {model.value for log in record.logs for model in log.models}
    here = [size for size in record.artifacts.values() if float(size) in told]
    if not total or not here or _is_packed(record) or total >= 0.995 * (max(here) + record.code_bytes):
        return None
    evidence = (
        f"submission.json claims {total:,.0f} bytes; {record.code_bytes:,} of code and {max(here):,} of the artifact, "
        f"both by stat(), make {max(here) + record.code_bytes:,}"
    )
    return Finding(ID, "violates", evidence, CLAUSE, record.claims.at(total))


def _of_another_size(record: Record) -> Finding | None:
    """One artifact lies here, larger than any that the logs tell of, and the claim is one of the logs' sums."""
    large = {path: size for path, size in record.artifacts.items() if size > 1_000_000}
    models = {model.value for log in record.logs for model in log.models}
    claimed = any(log.total and log.total.value == record.claims.total for log in record.logs)
    if len(large) != 1 or not claimed or not all(log.models for log in record.logs):
        return None
    (path, size), told = next(iter(large.items())), [value for value in models if value < LIMIT]
    if not told or size <= 1.005 * max(told) or size in models:
        return None
    evidence = f"{path} has {size:,} bytes, and the artifacts of the logs have {max(told):,.0f} at most"
    log = max(record.logs, key=lambda each: each.models[-1].value)
    return Finding(ID, "violates", evidence, CLAUSE, Place(log.path, log.models[-1].line))


def _is_packed(record: Record) -> bool:
    """Whether the code is counted as a packed wrapper that is not what was handed in."""
    said = [log.codes[-1].value for log in record.logs if log.codes] + [record.claims.code or 0.0]
    return 0.5 * record.packed_bytes <= max(said) < 0.6 * record.code_bytes


def _packed(case: Case, record: Record) -> Finding | None:
    if not _is_packed(record):
        return None
    said = max([log.codes[-1].value for log in record.logs if log.codes] + [record.claims.code or 0.0])
    evidence = (
        f"{said:,.0f} bytes are counted for the code, about what it weighs packed; the file handed in has "
        f"{record.code_bytes:,}"
    )
    return departure(case, "packed-code-count", CLAUSE, f"{evidence}.", Place(record.entry.path))


def _written(case: Case, record: Record) -> list[Finding]:
    """The sum in the script: against MiB, or without code. Logged sums within the limit make up for the first."""
    found = []
    made = sums(case.script)
    held = any(log.total and log.total.value <= LIMIT for log in record.logs)
    for each in made:
        if each.limit == MIB and not held and not any(other.limit == LIMIT for other in made):
            evidence = "the size is held against MiB (16 MiB are 16,777,216 bytes), and the limit is 16,000,000 bytes"
            found.append(_at(each, evidence))
    if made and not any(each.code or not each.alone for each in made):
        found.append(_at(made[0], "the size that is judged is the artifact's alone: no code is added to it"))
    larger = next((each for each in made if each.larger), None)
    if larger is not None:
        evidence = "the larger of code and artifact is judged, not what they come to together"
        found.append(_at(replace(larger, line=larger.larger), evidence))
    beside = second_file(case.body)
    if beside is not None:
        evidence = f"the file {beside[1]} is read back beside the artifact, and no size counts it"
        found.append(Finding(ID, "violates", evidence, CLAUSE, case.place(beside[0].lineno)))
    bare = squeezed(case.script) if made and not any("!" in script.path for script in case.script.all()) else None
    if bare is not None:
        evidence = "the code is weighed compressed, and what is handed in is the plain file"
        place = Place(case.script.path, case.script.line(bare.lineno))
        found.append(Finding(ID, "violates", evidence, CLAUSE, place))
    return found


def _at(made: Sum, evidence: str) -> Finding:
    return Finding(ID, "violates", evidence, CLAUSE, Place(made.script.path, made.script.line(made.line)))


def _judged(total: float) -> Verdict:
    return "violates" if total > LIMIT else "suspect"


def _said(record: Record) -> str:
    totals = [log.total.value for log in record.logs if log.total]
    if totals:
        most, code = f"{max(totals):,.0f}", f"{record.code_bytes:,}"
        return f"{len(totals)} logged sums, at most {most} of 16,000,000 bytes; code by stat(): {code}"
    if record.claims.total:
        return f"open: {record.claims.total:,.0f} of 16,000,000 bytes are claimed; no log says how they come about"
    return f"open: no size is claimed; the script has {record.code_bytes:,} bytes"
