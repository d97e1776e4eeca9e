"""A training log in the challenge's style: what it says of seed, steps, times, sizes and scores, with the lines.

step:5000/20000 val_loss:1.9612 val_bpb:1.1615 train_time:486012ms step_avg:97.20ms
Total submission size int6+lzma: 15863489 bytes
final_int6_roundtrip_exact val_loss:1.94812345 val_bpb:1.15379012 eval_time:74211ms
"""

import re
from dataclasses import dataclass, field, replace

from fairway.audit.printed import leaves, source_end, table_in
from fairway.audit.records import free
from fairway.audit.records.free import Progress
from fairway.audit.records.numbers import numbers

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
_SHORT = re.compile(
    r"\b(code|script|source|train_gpt)(?:\.py)?[\s:=]+(?:sha\w*[\s:=]+)?([0-9a-f]{12,64})\b", re.IGNORECASE
)
_ARTIFACT = re.compile(
    r"sha256\b[^:=\n]{0,40}\b(?:artifact|model|archive|weights)\b[^:=\n]{0,40}[:=]\s*([0-9a-f]{64})\b"
    r"|\b(?:artifact|model|archive|weights)\b[^:=\n]{0,40}sha256[^:=\n]{0,20}[:=]\s*([0-9a-f]{64})\b",
    re.IGNORECASE,
)
_TIMER = re.compile(r"\b(\d+(?:\.\d+)?)\s*(ms|s|sec|secs|seconds)\b")
_WARMING = re.compile(r"warmup_step[:\s=]+\d+(?:/|\s*$)")
_STAMP = re.compile(r"^\s*\[\s*(?:\d{4}-\d\d-\d\d[ T])?\d[\d:.,]*\s*(?:s|ms|sec)?\s*\]\s*")
_UNITS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "secs": 1.0, "seconds": 1.0, "m": 60.0}
_LONGEST = 2_000  # characters of a line that is looked at
_WIDEST = 20_000  # characters of one that holds a table of settings


@dataclass(frozen=True)
class Score:
    """One printed score. stage: the words before it; seconds: the time printed beside it, or None;
    tokens, bytes: what the line says was counted."""

    line: int
    stage: str
    bits_per_byte: float
    nats_per_token: float | None
    seconds: float | None
    step: int | None
    tokens: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Amount:
    """A printed number of bytes or seconds; says: its line's words."""

    line: int
    says: str
    value: float


@dataclass(frozen=True)
class Log:
    """source: the script printed at the head, or ""; artifact_hash: a sha256 printed for the artifact, or "".

    settings: what is printed before the first step, by name; tabled: the names that stand in a table of settings.

    progress: the lines of the training; timers: seconds printed after it, beside no score.
    """

    path: str
    seed: int | None = None
    seed_line: int = 0
    steps: int | None = None
    stop_line: int = 0
    train_seconds: float | None = None
    step_ms: float | None = None
    progress: tuple[Progress, ...] = ()
    scores: tuple[Score, ...] = ()
    codes: tuple[Amount, ...] = ()
    models: tuple[Amount, ...] = ()
    totals: tuple[Amount, ...] = ()
    timers: tuple[Amount, ...] = ()
    hashes: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    tabled: frozenset[str] = frozenset()
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


def _unstamped(text: str) -> str:
    """A log without the time of day, or since its beginning, in front of its lines: that is no figure of theirs."""
    return "\n".join(_STAMP.sub("", row) if len(row) < _LONGEST else row for row in text.split("\n"))


def read(path: str, text: str) -> Log:
    """All that a log says. Lines of the source at its head say nothing. Where the challenge's own phrases stand nowhere
    in it, its numbers are told by words, units and sums."""
    text = _unstamped(text)
    rows = text.split("\n")
    start = source_end(rows)
    source = "\n".join(rows[: start - 1]) if start else ""
    told = [(number, row[:_LONGEST]) for number, row in enumerate(rows, 1) if number > start]
    way = _progress(told)
    end = way[-1].line if way else 0
    codes, models, totals = _sizes(told)
    settings, tabled = _settings(rows[start : way[0].line if way else None])
    seed, seed_line = _seed(path, told)
    scores = _scores(told, end)
    after = [(number, row) for number, row in told if number > end and all(score.line != number for score in scores)]
    return Log(
        path,
        seed=seed,
        seed_line=seed_line,
        steps=way[-1].steps if way else None,
        stop_line=end,
        train_seconds=way[-1].seconds if way else None,
        step_ms=next((each.each for each in reversed(way) if each.each is not None), None),
        progress=tuple(way),
        scores=tuple(scores),
        codes=codes,
        models=models,
        totals=totals,
        timers=tuple(_timers(after)),
        hashes=_hashes(told),
        settings=settings,
        tabled=tabled,
        artifact_hash=next((m[1] or m[2] for _, row in reversed(told) if (m := _ARTIFACT.search(row))), "").lower(),
        source=source,
    )


def tells_of_a_run(text: str) -> bool:
    """Whether a text is a log: some line gives steps and their time, or bits per byte, beside other lines that do."""
    rows = list(enumerate(text.split("\n"), 1))
    told = [(number, row[:_LONGEST]) for number, row in (rows if len(rows) < 2000 else rows[:500] + rows[-1500:])]
    return len(free.progress(told)) > 1 or (len(told) > 5 and sum(1 for _ in free.scored(told)) > 1)


def _progress(told: list[tuple[int, str]]) -> list[Progress]:
    """The lines of the training: with `train_time`, else all that count steps and seconds before a size is given."""
    found = []
    for number, row in told:
        step, time, average = _STEP.search(row), _seconds(_TRAIN_TIME.search(row)), _STEP_AVERAGE.search(row)
        if step and time is not None:
            found.append(Progress(number, int(step[1]), time, float(average[1]) if average else None))
    return found or free.progress(told)


def _sizes(told: list[tuple[int, str]]) -> tuple[tuple[Amount, ...], ...]:
    """(codes, models, totals)"""
    codes, models, totals = (_amounts(pattern, told) for pattern in (_CODE, _MODEL, _TOTAL))
    if models or totals:
        return codes, models, totals
    said = free.sizes(told)
    parted = [
        tuple(Amount(s.line, s.row, s.value) for s in said if s.role == role) for role in ("code", "model", "total")
    ]
    return codes or parted[0], parted[1], parted[2]


def _hashes(told: list[tuple[int, str]]) -> dict[str, str]:
    """name -> hash, in small letters: sha256 of 64 digits, and the first digits of any on a line that speaks of it."""
    found = {(m[1] or m[3] or "").lower(): (m[2] or m[4]).lower() for _, row in told for m in _SHA.finditer(row)}
    rows = [row for _, row in told if re.search(r"sha\d|hash|digest|md5", row, re.IGNORECASE)]
    short = [m for row in rows for m in _SHORT.finditer(row) if re.search(r"[a-f]", m[2]) and re.search(r"\d", m[2])]
    return {m[1].lower(): m[2].lower() for m in short} | found


def _seed(path: str, told: list[tuple[int, str]]) -> tuple[int | None, int]:
    """(seed, line that gives it); by the file's name where no line does."""
    printed = next(((m, number) for number, row in told if (m := _SEED.search(row))), None)
    if printed is not None:
        return int(printed[0][1]), printed[1]
    named = _SEED_IN_NAME.search(path)
    return (int(named[1]) if named else None), 0


def _scores(told: list[tuple[int, str]], end: int) -> list[Score]:
    """Lines with `val_bpb`, and the time beside each; other lines with bits per byte where none of these comes after
    the training."""
    found = []
    for number, row in told:
        score = _SCORE.search(row)
        if score:
            loss, step = _LOSS.search(row), _STEP.search(row)
            stage = row[: min(score.start(), loss.start() if loss else score.start())].strip(" :\t")
            seconds = _seconds(_EVAL_TIME.search(row))
            nats = float(loss[1].rstrip(".")) if loss else None
            bits = float(score[1].rstrip("."))
            found.append(Score(number, stage, bits, nats, seconds, int(step[1]) if step else None, *free.counted(row)))
    rows = dict(told)
    free_ones = [
        Score(line, stage, bits.value, nats.value if nats else None, seconds, step, *free.counted(rows[line]))
        for line, stage, bits, nats, seconds, step in free.scored(told)
    ]
    if not any(score.line > end for score in found):
        return free_ones or found
    times = {score.line: score.seconds for score in free_ones}
    return [replace(score, seconds=score.seconds or times.get(score.line)) for score in found]


def _amounts(pattern: re.Pattern[str], told: list[tuple[int, str]]) -> tuple[Amount, ...]:
    found = [(number, row, pattern.search(row)) for number, row in told]
    return tuple(Amount(n, row.strip()[:120], float(_whole(m[1]))) for n, row, m in found if m and m[1].strip(",_"))


def _whole(text: str) -> int:
    return int(text.replace(",", "").replace("_", ""))


def _timers(told: list[tuple[int, str]]) -> list[Amount]:
    """The longest time of each line that gives no score: not what it is held against (`of 600s`)."""
    found = []
    for number, row in told:
        if not _TIMER.search(row) or _SCORE.search(row) or _TRAIN_TIME.search(row):
            continue
        times = [time for each in numbers(row) if (time := each.seconds) is not None]
        if times:
            found.append(Amount(number, row.strip()[:160], max(times)))
    return found


def _seconds(found: re.Match[str] | None) -> float | None:
    return float(found[1]) * _UNITS[found[2]] if found else None


def _settings(rows: list[str]) -> tuple[dict[str, str], frozenset[str]]:
    """name -> printed value, of the lines before the first step: `name: value`, and the tables of JSON among them; the
    names of these."""
    found: dict[str, str] = {}
    tabled: set[str] = set()
    for row in rows:
        if len(row) > _WIDEST:
            continue
        table = table_in(row)
        if table:
            found.update({name: str(value) for name, value in leaves(table).items()})
            tabled |= set(leaves(table))
            continue
        if _STEP.search(row) or _WARMING.search(row):  # "warmup_steps:20" is a setting
            break
        if "|" not in row:
            found.update(re.findall(r"(?<![\w./-])([A-Za-z_]\w*)\s*[:=]\s*([\w.+-]+)(?![\w./])", row[:_LONGEST]))
    return found, frozenset(tabled)
