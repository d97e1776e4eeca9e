"""What a comparison says: a row for each approach, the baseline's first."""

from dataclasses import dataclass
from pathlib import Path

from fairway.lab.compare.approaches import LeftOut
from fairway.lab.statistics import Difference

SURE = 0.05  # the verdict's level, after Holm: of all that a table calls better, the chance that any is not


@dataclass(frozen=True)
class Seeds:
    """The test over seeds, one by one. seeds: those that both have."""

    difference: Difference | None  # in bits per byte; None where they have fewer than two in common
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Documents:
    """The test over documents. why: there is none; else how many, and over which seeds each was averaged."""

    difference: Difference | None  # in bits per byte
    documents: int = 0
    seeds: tuple[int, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Against:
    """One approach against the baseline. Differences in bits per byte, below zero is better."""

    bits_per_byte: float
    nats_per_token: float
    welch: Difference | None
    holm: float | None  # Welch's chance of no gain, raised for all approaches of the table
    holm_worse: float | None
    by_seed: Seeds
    by_document: Documents
    verdict: str  # better, worse, no difference shown, not enough seeds
    bar_chance: float | None  # p that it gains less than MARGIN nats per token
    bar_met: bool
    bar_seeds: int | None  # more of both that it would take, were they like these; None: 99 would not show it


@dataclass(frozen=True)
class Compared:
    """An approach's row. Costs are means over its runs."""

    label: str
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    stage: str
    scores: tuple[float, ...]
    mean: float
    spread: float | None  # standard deviation; None for one seed
    low: float | None
    high: float | None
    nats_per_token: float
    artifact_bytes: float
    ms_per_step: float
    train_seconds: float
    score_seconds: float
    steps: int
    proof: str  # proven; proven on seed 1337; not proven
    proofs: tuple[str, ...]  # of each run: proven; proven on another seed of the same recipe; not proven
    against: Against | None  # None: the baseline itself


@dataclass(frozen=True)
class Comparison:
    """The whole table. notes: what a reader must know of it."""

    baseline: str
    stage: str
    text_sha256: str
    text_bytes: int
    rows: tuple[Compared, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    def gaps(self) -> list[str]:
        """What is left out, a line for each reason."""
        reasons = dict[str, list[str]]()
        for left in self.left_out:
            reasons.setdefault(left.why, []).append(left.run)
        return [
            f"{runs[0]}: {why}"
            if len(runs) == 1
            else f"{len(runs)} runs, {why}: {', '.join(Path(r).name for r in runs)}"
            for why, runs in reasons.items()
        ]
