"""A comparison as tables: for a terminal, and as Markdown for a README or a log."""

from collections.abc import Sequence
from dataclasses import dataclass

from fairway.lab.compare.result import SURE, Against, Compared, Comparison
from fairway.lab.statistics import CHANCE, MARGIN, Difference


@dataclass(frozen=True)
class Sheet:
    """One table. words: how many columns from the left hold words; the others hold numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


def tables(found: Comparison) -> list[Sheet]:
    """Scores, tests and costs, a row for each approach."""
    others = [row for row in found.rows if row.against is not None]
    sheets = [_scores(found)]
    if others:
        sheets.append(_tests(found, others))
    return [*sheets, _costs(found)]


def markdown(found: Comparison) -> str:
    """One table for a README or a log, and the lines that a reader must know."""
    scores = ("approach", "seeds", "bits per byte", "95 % interval", "difference", "nats per token", "p (Holm)")
    head = (*scores, "verdict", "p by document", "bar", "bytes", "ms/step", "score s", "proof")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in found.rows:
        against = row.against
        tests = ("", "", "", "baseline", "", "")
        if against is not None:
            tests = (
                f"{against.bits_per_byte:+.4f}",
                f"{against.nats_per_token:+.4f}",
                f"{chance(_towards(against.welch))} ({_raised(against)})",
                against.verdict,
                chance(_towards(against.by_document.difference)),
                bar(against),
            )
        cells = (
            row.label,
            str(len(row.seeds)),
            _mean(row),
            _interval(row.low, row.high),
            *tests,
            *_cost(row),
            row.proof,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", *(f"- {line}" for line in remarks(found))]) + "\n"


def remarks(found: Comparison) -> list[str]:
    """What stands below the tables."""
    lines = [
        f"{found.text_bytes:,} bytes of text (sha256 {found.text_sha256[:12]}); differences from "
        f"{found.baseline}, below zero is better; p is one-sided, towards each difference's "
        f"own side; verdict: Holm's p < {SURE:g}.",
        f"Bar: {MARGIN} nats per token better at p < {CHANCE:g} (Welch). Welch asks about other seeds on this text, "
        "documents about other text with these models.",
    ]
    return [*lines, *found.notes, *(f"Left out: {gap}." for gap in found.gaps())]


def bar(against: Against) -> str:
    """The challenge's bar in words."""
    if against.bar_met:
        return "met"
    if against.bar_seeds is None:
        return "not met by 99 seeds" if against.nats_per_token < -MARGIN else "not met: the mean is short of it"
    return f"not met: {against.bar_seeds} more seed{'s' * (against.bar_seeds != 1)} of both"


def chance(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _scores(found: Comparison) -> Sheet:
    head = ("approach", "verdict", "seeds", "bits per byte", "95 % interval", "difference", "nats/token", "stage")
    rows = []
    for row in found.rows:
        told = ("baseline", "", "")
        if row.against is not None:
            told = (row.against.verdict, f"{row.against.bits_per_byte:+.4f}", f"{row.against.nats_per_token:+.4f}")
        cells = (
            row.label,
            told[0],
            str(len(row.seeds)),
            _mean(row),
            _interval(row.low, row.high),
            *told[1:],
            row.stage,
        )
        rows.append(cells)
    return Sheet("scores", head, tuple(rows), 2)


def _tests(found: Comparison, others: Sequence[Compared]) -> Sheet:
    head = (f"against {found.baseline}", "bar", "Welch", "p", "Holm", "by seed", "p", "by document", "p")
    rows = []
    for row in others:
        against = row.against
        assert against is not None
        by_document = against.by_document
        told = _each(by_document.difference) if by_document.difference is not None else (by_document.why, "-")
        rows.append(
            (
                row.label,
                bar(against),
                *_each(against.welch),
                _raised(against),
                *_each(against.by_seed.difference),
                *told,
            )
        )
    return Sheet("tests: 95 % interval of the difference in bits per byte, and p", head, tuple(rows), 2)


def _costs(found: Comparison) -> Sheet:
    head = ("cost", "proof", "artifact bytes", "ms/step", "score s", "training s", "steps")
    rows = [(row.label, row.proof, *_cost(row), f"{row.train_seconds:.1f}", f"{row.steps:,}") for row in found.rows]
    return Sheet("cost, the mean of the runs", head, tuple(rows), 2)


def _cost(row: Compared) -> tuple[str, str, str]:
    return f"{row.artifact_bytes:,.0f}", f"{row.ms_per_step:.1f}", f"{row.score_seconds:.1f}"


def _mean(row: Compared) -> str:
    return f"{row.mean:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}")


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "-" if low is None or high is None else f"{low:{sign}.4f} to {high:{sign}.4f}"


def _each(test: Difference | None) -> tuple[str, str]:
    """(interval, chance) of a test."""
    return ("-", "-") if test is None else (_interval(test.low, test.high, "+"), chance(_towards(test)))


def _towards(test: Difference | None) -> float | None:
    """The chance on the test's own side: it may lie on another than the means do, where seeds are not all in common."""
    if test is None:
        return None
    return test.below if test.mean <= 0 else test.above


def _raised(against: Against) -> str:
    return chance(against.holm if against.bits_per_byte <= 0 else against.holm_worse)
