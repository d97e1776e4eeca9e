"""The record's own figures, made anew: means and deviations, steps times milliseconds, seeds, significance."""

import math
import re
import statistics

from fairway.audit.case import Case
from fairway.audit.records import Log, Record, record_of
from fairway.audit.records.statistics import below, welch
from fairway.audit.verdict import Finding, Place, Verdict

ID = "record-figures"
CHARGE = "The record's figures do not follow from its logs."
CLAUSE = "R9, R10: 3 seeds, 0.005 nats at p < 0.01, every seed reported"
WITHOUT_SCRIPT = True

_JSON = Place("submission.json")
BAR_NATS = 0.005
CHANCE = 0.01


def check(case: Case) -> Finding:
    """The gravest disagreement, or what was recomputed."""
    submission = case.submission
    record = record_of(submission)
    if submission.flaw:
        return Finding(ID, "suspect", f"{submission.flaw}: the claims cannot be read", CLAUSE, _JSON)
    if not record.logs and not record.claims.table:
        return Finding(ID, "clean", "open: no figures are claimed", CLAUSE)
    found = [
        *_products(record),
        *_ratios(record),
        *_parts(record),
        *_scores(record),
        *_means(record),
        *_seeds(record),
        *_bar(record),
        *_rows(record, submission.readme),
    ]
    if found:
        first = next((each for each in found if each.verdict == "violates"), found[0])
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return Finding(ID, first.verdict, first.evidence + more, CLAUSE, first.place)
    return Finding(ID, "clean", _said(record), CLAUSE)


def _finding(verdict: Verdict, evidence: str, place: Place) -> Finding:
    return Finding(ID, verdict, evidence, CLAUSE, place)


def _products(record: Record) -> list[Finding]:
    """Steps times the average of one is the time of training; where the last average is an older one, the steps since
    then cannot have run at twice the pace."""
    found = []
    for log in record.logs:
        rated = next((each for each in reversed(log.progress) if each.each), None)
        if rated is None or rated.each is None or not log.steps or not log.train_seconds:
            continue
        made = log.steps * rated.each / 1000
        if rated.steps >= 0.99 * log.steps:
            fits = abs(made - log.train_seconds) <= 0.02 * log.train_seconds + log.steps * 0.005 / 1000
        else:
            since, spent = (log.steps - rated.steps) * rated.each / 1000, log.train_seconds - rated.seconds
            fits = since <= 2 * spent + 1
        if not fits:
            evidence = (
                f"{log.path}: {log.steps:,} steps of {rated.each:g} ms make {made:.1f} s, and the line says "
                f"{log.train_seconds:.1f} s"
            )
            found.append(_finding("violates", evidence, Place(log.path, log.stop_line)))
    return found


def _ratios(record: Record) -> list[Finding]:
    """Bits per byte over nats per token is one number of the text: tokens per byte, over ln 2."""
    found = []
    for log in record.logs:
        both = [s for s in log.scores if s.nats_per_token and s.nats_per_token > 0.1]
        ratios = [(s.bits_per_byte / s.nats_per_token, s) for s in both if s.nats_per_token]
        if len(ratios) > 1:
            usual, (last, score) = statistics.median(ratio for ratio, _ in ratios), ratios[-1]
            if abs(last / usual - 1) > 0.01:
                evidence = (
                    f"{log.path}: the reported score has {last:.4f} bits per byte for each nat per token, the others "
                    f"{usual:.4f}: its bytes or tokens are counted otherwise"
                )
                found.append(_finding("suspect", evidence, Place(log.path, score.line)))
    return found


def _parts(record: Record) -> list[Finding]:
    """Bits per byte are nats per token over ln 2, times tokens over bytes, where one line gives all four."""
    found = []
    for log in record.logs:
        for score in log.scores:
            if score.nats_per_token and score.tokens and score.bytes:
                made = score.nats_per_token / math.log(2) * score.tokens / score.bytes
                if abs(made - score.bits_per_byte) > 0.01 * score.bits_per_byte:
                    evidence = (
                        f"{log.path}: {score.nats_per_token} nats per token, {score.tokens:,.0f} tokens and "
                        f"{score.bytes:,.0f} bytes make {made:.4f} bits per byte, and the line says "
                        f"{score.bits_per_byte}"
                    )
                    found.append(_finding("violates", evidence, Place(log.path, score.line)))
                    break
    return found


def _finals(record: Record) -> dict[int, tuple[float, Log]]:
    """seed -> its last score."""
    return {log.seed: (log.final.bits_per_byte, log) for log in record.logs if log.final and log.seed is not None}


def _scores(record: Record) -> list[Finding]:
    """Claimed scores against logged ones."""
    found = []
    logged = _finals(record)
    for seed, score in record.claims.seeds().items():
        if score is not None and seed in logged and not _near(score, [s.bits_per_byte for s in logged[seed][1].scores]):
            evidence = f"seed {seed} is claimed with {score}, and {logged[seed][1].path} ends with {logged[seed][0]}"
            found.append(_finding("violates", evidence, record.claims.at(score)))
    claimed, mean = record.claims.score, record.claims.mean
    scores = [log.final.bits_per_byte for log in record.logs if log.final]
    if claimed is not None and scores:
        every = [s.bits_per_byte for log in record.logs for s in log.scores]
        means = [statistics.fmean(scores), *_mean_of_claims(record)]
        if not _near(claimed, [*every, *means]):
            evidence = f"submission.json claims {claimed}, and the logs end with {', '.join(map(str, scores))}"
            found.append(_finding("violates", evidence, record.claims.at(claimed)))
    if mean is not None and len(scores) > 1 and not _near(mean, [statistics.fmean(scores)]):
        made = statistics.fmean(scores)
        evidence = f"submission.json gives {mean} as the mean, and that of the {len(scores)} logs is {made:.5f}"
        found.append(_finding("violates", evidence, record.claims.at(mean)))
    return found


def _rows(record: Record, readme: str) -> list[Finding]:
    """Rows of a table of seeds in the README that give a score: one that the seed's log prints."""
    found, head = [], ""
    logs = {log.seed: log for log in record.logs if log.seed is not None and log.scores}
    for line, row in enumerate(readme.split("\n"), 1):
        head = (head or row.lower()) if "|" in row else ""
        cells = [cell.strip(" *`") for cell in row.strip().strip("|").split("|")]
        log = logs.get(int(cells[0])) if "seed" in head.strip(" |").split("|")[0] and cells[0].isdecimal() else None
        told = [float(cell) for cell in cells[1:] if re.fullmatch(r"[0-3]\.\d{4,}", cell)]
        if log is None or not told:
            continue
        printed = [n for s in log.scores for n in (s.bits_per_byte, s.nats_per_token) if n is not None]
        if not any(_near(score, printed) for score in told):
            final = log.scores[-1].bits_per_byte
            evidence = f"the README gives {told[0]} for seed {log.seed}, and {log.path} ends with {final}"
            found.append(_finding("violates", evidence, Place("README.md", line)))
    return found


def _mean_of_claims(record: Record) -> list[float]:
    values = [score for score in record.claims.seeds().values() if score is not None]
    return [statistics.fmean(values)] if values else []


def _means(record: Record) -> list[Finding]:
    """The claimed mean and deviation of the claimed seeds."""
    values = [score for score in record.claims.seeds().values() if score is not None]
    if len(values) < 2:
        return _spread_of_logs(record)
    found = []
    claimed, deviation = record.claims.score, record.claims.deviation
    if claimed is not None and not _near(claimed, [statistics.fmean(values), *values]):
        evidence = (
            f"submission.json claims {claimed}; the mean of its {len(values)} seeds is {statistics.fmean(values):.5f}"
        )
        found.append(_finding("violates", evidence, record.claims.at(claimed)))
    spreads = [statistics.stdev(values), statistics.pstdev(values)]
    if deviation is not None and not _near(deviation, spreads):
        evidence = (
            f"submission.json claims a deviation of {deviation}; that of its {len(values)} seeds is {spreads[0]:.5f}"
        )
        found.append(_finding("violates", evidence, record.claims.at(deviation)))
    return found


def _spread_of_logs(record: Record) -> list[Finding]:
    """A claimed deviation, where no seeds are claimed one by one, against that of the scores that the logs end with."""
    values = [log.final.bits_per_byte for log in record.logs if log.final]
    deviation = record.claims.deviation
    if deviation is None or len(values) < 2 or len(set(values)) < 2:
        return []
    made = statistics.stdev(values)
    if _near(deviation, [made, statistics.pstdev(values)]):
        return []
    evidence = f"submission.json claims a deviation of {deviation}; that of the {len(values)} logs is {made:.5f}"
    return [_finding("violates" if deviation < made / 2 else "suspect", evidence, record.claims.at(deviation))]


def _seeds(record: Record) -> list[Finding]:
    """Seeds that are claimed and have no log, or have one and are not claimed."""
    claimed, logged = set(record.claims.seeds()), {log.seed for log in record.logs if log.seed is not None}
    if len(claimed) > 1 and record.logs and claimed - logged and len(record.logs) < len(claimed):
        missing = ", ".join(map(str, sorted(claimed - logged)))
        return [_finding("suspect", f"seeds {missing} are claimed, and no log of them was handed in", _JSON)]
    if len(claimed) > 1 and logged - claimed:
        extra = sorted(logged - claimed)
        path = next(log.path for log in record.logs if log.seed == extra[0])
        says = f"seed {extra[0]} was run and is not among the reported ones ({', '.join(map(str, sorted(claimed)))})"
        return [_finding("suspect", says, Place(path))]
    return []


def _bar(record: Record) -> list[Finding]:
    """A claimed p against the one that the seeds give for the claimed bar and 0.005 nats."""
    chance, verdict = record.claims.chance, significance(record)
    if chance is None or verdict is None or chance >= CHANCE or verdict[0] < CHANCE:
        return []
    p, says = verdict
    return [_finding("violates", f"submission.json claims p = {chance}; {says}: p = {p:.2g}", record.claims.at(chance))]


def significance(record: Record) -> tuple[float, str] | None:
    """(p, what was tested) of the seeds against the claimed bar less 0.005 nats; None where that is not claimed."""
    values = [score for score in record.claims.seeds().values() if score is not None] or [
        score for score, _ in _finals(record).values()
    ]
    bar, others, factor = record.claims.bar, record.claims.bar_values, _bits_for_a_nat(record)
    if factor is None or len(values) < 2:
        return None
    if len(others) > 1:
        p = welch(values, others, BAR_NATS * factor)
        return (
            p,
            f"Welch's test of {len(values)} seeds against {len(others)} of the record before, less {BAR_NATS} nats",
        )
    if bar is None:
        return None
    asked = bar - BAR_NATS * factor
    return below(values, asked), f"{len(values)} seeds against {bar} - {BAR_NATS} nats = {asked:.5f}"


def _bits_for_a_nat(record: Record) -> float | None:
    """Bits per byte for one nat per token, from a score that is printed in both."""
    both = [s for log in record.logs for s in log.scores if s.nats_per_token]
    last = both[-1] if both else None
    return last.bits_per_byte / last.nats_per_token if last and last.nats_per_token else None


def _near(value: float, others: list[float]) -> bool:
    """Whether a number is one of the others, rounded to as many digits as it shows."""
    shown = re.search(r"\.(\d+)", f"{value:.12f}".rstrip("0"))
    digits = len(shown[1]) if shown else 0
    return any(math.isclose(value, other, abs_tol=0.51 * 10 ** -min(digits, 4)) for other in others)


def _said(record: Record) -> str:
    finals = _finals(record)
    parts = [f"{len(record.logs)} logs"] if record.logs else ["no log"]
    values = [score for score, _ in finals.values()]
    if len(values) > 1:
        parts.append(
            f"mean {statistics.fmean(values):.5f}, deviation {statistics.stdev(values):.5f} of {len(values)} seeds"
        )
    tested = significance(record)
    parts.append(f"{tested[1]}: p = {tested[0]:.2g}" if tested else "no bar is claimed")
    return "; ".join(parts)
