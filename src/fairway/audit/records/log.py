"""A training log in the challenge's style: what it says of seed, steps, times, sizes and scores, with the lines.

step:5000/20000 val_loss:1.9612 val_bpb:1.1615 train_time:486012ms step_avg:97.20ms
Total submission size int6+lzma: 15863489 bytes
final_int6_roundtrip_exact val_loss:1.94812345 val_bpb:1.15379012 eval_time:74211ms
"""

import re
from dataclasses import dataclass, field

_STEP = re.compile(r"(?<![\w])step[:\s=]+(\d+)(?:/(\d+))?\b")
_TRAIN_TIME = re.compile(r"train_time[:=]\s*([\d.]+)\s*(ms|s|m)\b")
_STEP_AVERAGE = re.compile(r"step_avg[:=]\s*([\d.]+)\s*ms")
_SCORE = re.compile(r"val_bpb[:=]\s*([\d.]+)")
_LOSS = re.compile(r"val_loss[:=]\s*([\d.]+)")
_EVAL_TIME = re.compile(r"(?:eval_time|elapsed|eval)[:=]\s*([\d.]+)\s*(ms|s|m)\b")
_SEED = re.compile(r"(?<![\w])seed['\"]?\s*[:= ]\s*(\d+)\b", re.IGNORECASE)
_SEED_IN_NAME = re.compile(r"seed[_-]?(\d+)", re.IGNORECASE)
_BYTES = r"([\d,_]+)\s*(?:bytes|B)?\b"
_CODE = re.compile(r"code\s*size[^:=\d]*[:=]\s*" + _BYTES, re.IGNORECASE)
_MODEL = re.compile(r"serialized\s*model[^:=]*[:=]\s*" + _BYTES, re.IGNORECASE)
_TOTAL = re.compile(r"total\s*submission\s*size[^:=]*[:=]\s*" + _BYTES, re.IGNORECASE)
_SHA = re.compile(r"sha256[\s:=]*(\w+)?[\s:=]+([0-9a-f]{64})\b|(\w+)[_\s]sha256[\s:=]+([0-9a-f]{64})\b", re.IGNORECASE)
_ARTIFACT = re.compile(
    r"sha256\b[^:=\n]{0,40}\b(?:artifact|model|archive|weights)\b[^:=\n]{0,40}[:=]\s*([0-9a-f]{64})\b"
    r"|\b(?:artifact|model|archive|weights)\b[^:=\n]{0,40}sha256[^:=\n]{0,20}[:=]\s*([0-9a-f]{64})\b",
    re.IGNORECASE,
)
_TIMER = re.compile(r"\b(\d+(?:\.\d+)?)\s*(ms|s|sec|secs|seconds)\b")
_RULE = re.compile(r"={40,}$")
_WARMING = re.compile(r"warmup_step[:\s=]+\d+(?:/|\s*$)")
_UNITS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "secs": 1.0, "seconds": 1.0, "m": 60.0}
_LONGEST = 2_000  # characters of a line that is looked at


@dataclass(frozen=True)
class Score:
    """One printed score. stage: the words before it; seconds: the time printed beside it, or None."""

    line: int
    stage: str
    bits_per_byte: float
    nats_per_token: float | None
    seconds: float | None
    step: int | None


@dataclass(frozen=True)
class Amount:
    """A printed number of bytes or seconds; says: its line's words."""

    line: int
    says: str
    value: float


@dataclass(frozen=True)
class Log:
    """source: the script printed at the head, or ""; artifact_hash: a sha256 printed for the artifact, or "".

    timers: seconds printed after training, beside no score.
    """

    path: str
    seed: int | None = None
    steps: int | None = None
    stop_line: int = 0
    train_seconds: float | None = None
    step_ms: float | None = None
    scores: tuple[Score, ...] = ()
    codes: tuple[Amount, ...] = ()
    models: tuple[Amount, ...] = ()
    totals: tuple[Amount, ...] = ()
    timers: tuple[Amount, ...] = ()
    hashes: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    artifact_hash: str = ""
    source: str = ""

    @property
    def final(self) -> Score | None:
        """The last score: exact lines repeat it with more digits."""
        return self.scores[-1] if self.scores else None

    @property
    def total(self) -> Amount | None:
        """The last sum: the first one is that of the uncompressed model."""
        return self.totals[-1] if self.totals else None


def read(path: str, text: str) -> Log:
    """All that a log says. Lines of the source at its head say nothing."""
    rows = text.split("\n")
    start = _source_end(rows)
    source = "\n".join(rows[: start - 1]) if start else ""
    told = [(number, row[:_LONGEST]) for number, row in enumerate(rows, 1) if number > start]
    trained = [(number, row) for number, row in told if _TRAIN_TIME.search(row) and _STEP.search(row)]
    last = trained[-1] if trained else None
    end = last[0] if last else 0
    return Log(
        path,
        seed=_seed(path, told),
        steps=int(_STEP.search(last[1])[1]) if last else None,  # type: ignore[index]
        stop_line=end,
        train_seconds=_seconds(_TRAIN_TIME.search(last[1])) if last else None,
        step_ms=next((float(m[1]) for _, row in reversed(trained) if (m := _STEP_AVERAGE.search(row))), None),
        scores=tuple(_scores(told)),
        codes=_amounts(_CODE, told),
        models=_amounts(_MODEL, told),
        totals=_amounts(_TOTAL, told),
        timers=tuple(_timers([(number, row) for number, row in told if number > end])),
        hashes={(m[1] or m[3] or "").lower(): m[2] or m[4] for _, row in told for m in _SHA.finditer(row)},
        settings=_settings(told, end),
        artifact_hash=next((m[1] or m[2] for _, row in reversed(told) if (m := _ARTIFACT.search(row))), "").lower(),
        source=source,
    )


def _source_end(rows: list[str]) -> int:
    """The line of `=` that closes the source at the head; 0 where there is none."""
    for number, row in enumerate(rows[:6_000], 1):
        if _RULE.match(row.strip()) and number > 20:
            head = rows[: number - 1]
            return number if any(line.startswith(("import ", "from ", "def ", "exec")) for line in head) else 0
    return 0


def _seed(path: str, told: list[tuple[int, str]]) -> int | None:
    found = next((m for _, row in told if (m := _SEED.search(row))), None) or _SEED_IN_NAME.search(path)
    return int(found[1]) if found else None


def _scores(told: list[tuple[int, str]]) -> list[Score]:
    found = []
    for number, row in told:
        score = _SCORE.search(row)
        if score:
            loss, step = _LOSS.search(row), _STEP.search(row)
            stage = row[: min(score.start(), loss.start() if loss else score.start())].strip(" :\t")
            seconds = _seconds(_EVAL_TIME.search(row))
            nats = float(loss[1].rstrip(".")) if loss else None
            bits = float(score[1].rstrip("."))
            found.append(Score(number, stage, bits, nats, seconds, int(step[1]) if step else None))
    return found


def _amounts(pattern: re.Pattern[str], told: list[tuple[int, str]]) -> tuple[Amount, ...]:
    found = [(number, row, pattern.search(row)) for number, row in told]
    return tuple(Amount(n, row.strip()[:120], float(_whole(m[1]))) for n, row, m in found if m and m[1].strip(",_"))


def _whole(text: str) -> int:
    return int(text.replace(",", "").replace("_", ""))


def _timers(told: list[tuple[int, str]]) -> list[Amount]:
    found = []
    for number, row in told:
        times = _TIMER.findall(row)
        if times and not _SCORE.search(row) and not _TRAIN_TIME.search(row):
            found.append(Amount(number, row.strip()[:160], max(float(t) * _UNITS[unit] for t, unit in times)))
    return found


def _seconds(found: re.Match[str] | None) -> float | None:
    return float(found[1]) * _UNITS[found[2]] if found else None


def _settings(told: list[tuple[int, str]], end: int) -> dict[str, str]:
    """name -> printed value, of the lines before the first step."""
    found: dict[str, str] = {}
    for _, row in told:
        if _STEP.search(row) or _WARMING.search(row):  # "warmup_steps:20" is a setting
            break
        if "|" not in row:
            found.update(re.findall(r"(?<![\w./-])([A-Za-z_]\w*)\s*[:=]\s*([\w.+-]+)(?![\w./])", row))
    return found
