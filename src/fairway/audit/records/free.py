"""What a log says whose phrases nobody has met: steps, times, scores and sizes, told by words, units and sums."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from fairway.audit.records.numbers import Number, numbers, step_of

Rows = Sequence[tuple[int, str]]
"""(number, text) of lines."""

_CODE = frozenset(("code", "script", "source", "py", "program"))
_TOTAL = frozenset(("total", "sum", "submission", "together", "overall", "all"))
_MODEL = frozenset(
    ("model", "artifact", "archive", "weights", "blob", "packed", "compressed", "payload", "checkpoint", "container")
)
_COUNTED = """
    params parameters param tokens token targets documents docs shards shard seed step steps memory peak allocated
    reserved dim vocab rows windows batch port rank
"""
_NO_SIZE = frozenset(_COUNTED.split())
_SIZED = re.compile(r"\bbytes?\b|bytes_|_bytes|\bsizes?\b|\d\s?B\b", re.IGNORECASE)
_BITS = re.compile(r"bpb|bits.{0,5}byte", re.IGNORECASE)
_STEPPED = re.compile(r"\b(?:step|it|iter|iteration|update)s?\b|_step\b|^\W{0,3}\d+/\d", re.IGNORECASE)
_LONG = re.compile(r"(?:\d{3}|\d[,_]\d{3}).*(?:\d{3}|\d[,_]\d{3})|(?:byte|size).*\d{3}|\d{3}.*byte", re.IGNORECASE)
_MOST = 3_000  # lines of one kind that are looked at: the first and the last ones
_ASIDE = re.compile(r"warm-?up|rehears|compil", re.IGNORECASE)


@dataclass(frozen=True)
class Progress:
    """One line of the training: how many steps had taken how many seconds; each: ms for one step, if it says so."""

    line: int
    steps: int
    seconds: float
    each: float | None


@dataclass(frozen=True)
class Said:
    """A size that a line gives; role: "code", "model" or "total"."""

    line: int
    row: str
    role: str
    value: float


def progress(told: Rows) -> list[Progress]:
    """The lines that give both a count of steps and the time that they took, as far as the count grows; a warm-up's and
    a schedule's counts are none."""
    found: list[Progress] = []
    for line, row in _ends([(line, row) for line, row in told if _STEPPED.search(row) and not _ASIDE.search(row)]):
        read = numbers(row)
        step = step_of(read)
        if step is None or (found and step.value < found[-1].steps):
            continue
        times = [(each, seconds) for each in read if (seconds := each.seconds) is not None and not each.is_rate]
        if not times:
            continue
        seconds = max(seconds for _, seconds in times)
        rate = next((each.rate_ms for each in read if each.rate_ms is not None), None)
        if rate is None:  # `523.7s 87.29ms`: the time that is printed in a smaller unit is that of one step
            small = [(each, ms * 1000) for each, ms in times if each.unit.startswith("ms") and ms < seconds]
            rate = small[-1][1] if small and not all(each.unit.startswith("ms") for each, _ in times) else None
        found.append(Progress(line, int(step.value), seconds, rate))
    return found


def _ends(rows: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The first and the last of many lines."""
    return rows if len(rows) <= _MOST else rows[: _MOST // 4] + rows[-3 * _MOST // 4 :]


def scored(told: Rows) -> Iterator[tuple[int, str, Number, Number | None, float | None, int | None]]:
    """(line, text before, bits per byte, nats per token, seconds, step) of the lines that give bits per byte."""
    for line, row in _ends([(line, row) for line, row in told if _BITS.search(row)]):
        read = numbers(row)
        bits = next((each for each in read if each.is_bits), None)
        if bits is None:
            continue
        nats = next((each for each in reversed(read) if each.is_nats and each.at < bits.at), None)
        nats = nats or next((each for each in read if each.is_nats), None)
        step = step_of(read)
        times = [seconds for each in read if (seconds := each.seconds) is not None and _of_evaluation(each)]
        before = row[: min(bits.at, nats.at if nats else bits.at)].strip(" :\t|{\"'")
        yield line, before, bits, nats, times[-1] if times and step is None else None, int(step.value) if step else None


def counted(row: str) -> tuple[float | None, float | None]:
    """(tokens, bytes) that a line of a score counts, where it counts millions of them."""
    read = [each for each in numbers(row) if each.whole and each.value >= 1e6 and not each.bound]
    tokens = next((each.value for each in read if each.said & {"tokens", "targets", "positions", "toks"}), None)
    return tokens, next((each.value for each in read if each.said & {"bytes", "nbytes"}), None)


def _of_evaluation(time: Number) -> bool:
    return not time.is_rate and not any(word.startswith("train") for word in time.near)


def sizes(told: Rows) -> list[Said]:
    """Sizes of code, model and both together: by the words before them, or because two of a line make the third."""
    found: list[Said] = []
    for line, row in _ends([(line, row) for line, row in told if _LONG.search(row)]):
        read = [each for each in numbers(row) if _may_be_size(each)]
        made = _summed(read)
        if not made and not _SIZED.search(row):
            continue
        for each in read:
            role = made.get(each.at) or _role(each)
            if role is not None and (made or each.value >= (1000 if role == "code" else 100_000)):
                found.append(Said(line, row.strip()[:120], role, each.value))
    return found


def _may_be_size(each: Number) -> bool:
    kept = each.whole and each.value >= 100 and not each.bound and each.seconds is None
    return kept and not (_NO_SIZE & set(each.label[-2:])) and each.unit not in _NO_SIZE


def _role(each: Number) -> str | None:
    """What a size is of, by the nearest word that says so."""
    if each.equals:
        return "total"
    for word in reversed(each.label[-3:]):
        for role, words in (("code", _CODE), ("total", _TOTAL), ("model", _MODEL)):
            if word in words:
                return role
    return None


def _summed(read: list[Number]) -> dict[int, str]:
    """place -> role, where two numbers of a line make a third: the smaller of the two is the code."""
    for one, other, whole in permutations(read[:6], 3):
        if one.value > other.value and one.value + other.value == whole.value and whole.value < 1e9:
            return {one.at: "model", other.at: "code", whole.at: "total"}
    return {}
