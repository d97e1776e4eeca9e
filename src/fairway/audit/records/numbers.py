"""The numbers of one printed line, each with the words before it and the unit behind it.

What a number means is told by these alone, whatever phrase a script chose:

it 6000 loss 2.0046 clock 522.9s 87.15ms/it        step, loss, seconds, milliseconds for each step
artifact: model 15204331 + code 45786 = 15250117 bytes of 16000000
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<![\w.#])[-+]?(\d{1,3}(?:[,_]\d{3})+|\d+)(\.\d+)?(?:[eE][-+]?\d+)?(?![\w]*[_])")
_UNIT = re.compile(r"""['"]?\s?\(?([A-Za-zµ]+)(?:\s?(?:/|\bper\s)\s?([A-Za-z]+))?""")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_BOUND = re.compile(r"(?:\bof|/|<=?|\bat most)[\s(]*$", re.IGNORECASE)
_CALLED = re.compile(r"([A-Za-z_]\w*)[\s:=(\"']*$")  # the identifier before a number
_HELD = frozenset(("limit", "cap", "budget", "max", "maximum", "allowed"))
_OTHER = frozenset(("per", "every", "num", "n", "min", "total", "start", "end", "from", "until", "warmup", "warm"))
_SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "msecs", "millis", "milliseconds"), 0.001),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), 60.0),
}
_STEP = frozenset(("step", "it", "iter", "iteration", "update"))
_STEPS = _STEP | {word + "s" for word in _STEP}
_TIMES = frozenset(("time", "elapsed", "took", "clock", "duration", "wall", "wallclock"))
_RATES = frozenset(("avg", "average", "mean", "per", "each"))
_BITS = (("bpb",), ("bits", "per", "byte"), ("bits", "byte"))
_NATS = frozenset(("loss", "nll", "ce", "xent", "nats", "entropy"))
_DIGITS = 24  # characters of a number: a longer one is a hash or noise
_REACH = 5  # words before a number that speak of it


@dataclass(frozen=True)
class Number:
    """label: the words since the number before, in small letters, identifiers taken apart; called: those of the last
    identifier; unit: the word behind it;
    each: what it is given for one of (`ms/it`: it); bound: whether it is what another number is held against;
    equals: whether only an equals sign stands before it; over: whether a slash does (4500/20000); at: its place."""

    value: float
    text: str
    label: tuple[str, ...]
    called: tuple[str, ...]
    unit: str
    each: str
    bound: bool
    equals: bool
    over: bool
    at: int

    @property
    def whole(self) -> bool:
        return self.value == int(self.value) and "." not in self.text

    @property
    def near(self) -> tuple[str, ...]:
        return self.label[-_REACH:]

    @property
    def said(self) -> set[str]:
        """What it counts: the word before it, or behind it."""
        return {*self.label[-1:], self.unit}

    @property
    def is_step(self) -> bool:
        """Counts steps: `step 6000`, `it:6000`, `8211 steps`; not those of a schedule or a warm-up."""
        said = self.unit in _STEPS or (bool(self.called) and self.called[-1] in _STEP)
        aside = bool(_OTHER & set(self.called)) or any(word.startswith("warm") for word in self.near)
        return self.whole and said and not self.bound and not aside

    @property
    def is_bits(self) -> bool:
        """Bits per byte."""
        said = any(self.label[-len(words) :] == words for words in _BITS) or self.unit == "bpb"
        return said and not self.whole and not self.bound and 0 < self.value < 20

    @property
    def is_nats(self) -> bool:
        return bool(self.label) and self.label[-1] in _NATS and not self.whole and self.value > 0

    @property
    def seconds(self) -> float | None:
        """A time in seconds, by its unit or by the last word before it."""
        if self.each or self.bound or self.value < 0:
            return None
        unit = _SECONDS.get(self.unit)
        if unit is None and self.unit == "m" and _TIMES & set(self.near):
            unit = 60.0
        if unit is None and self.label and not self.over:
            unit = _SECONDS.get(self.label[-1])
        return None if unit is None else self.value * unit

    @property
    def is_rate(self) -> bool:
        """A time for one step: by its unit, or by the words before it."""
        return self.each in _STEPS or (self.seconds is not None and bool(_RATES & set(self.label[-2:])))

    @property
    def rate_ms(self) -> float | None:
        """Milliseconds for one step."""
        unit = _SECONDS.get(self.unit) or _SECONDS.get(self.label[-1] if self.label else "")
        return self.value * unit * 1000 if self.is_rate and unit else None


def numbers(row: str) -> list[Number]:
    """Every number of a line, in order."""
    return list(_read(row))


def step_of(row: list[Number]) -> Number | None:
    """The count of steps that a line gives: by its word, or as the first of `4500/20000` at its head."""
    said = next((number for number in row if number.is_step), None)
    if said is not None or len(row) < 2 or row[0].label or not row[0].whole:
        return said
    return row[0] if row[1].bound and row[1].over and not row[1].label else None


def _read(row: str) -> Iterator[Number]:
    last = 0
    for found in _NUMBER.finditer(row):
        if len(found[0]) > _DIGITS:
            continue
        between = row[last : found.start()]
        unit = _unit(row, found.end())
        if unit is None and found.end() < len(row) and row[found.end()].isalpha():
            continue  # 2k, 3rd, 11L: a part of a word
        called = _words(name[1]) if (name := _CALLED.search(between)) else ()
        last = unit.end() if unit and _is_unit(unit) else found.end()
        value = float(found[0].replace(",", "").replace("_", ""))
        if not math.isfinite(value):
            continue
        yield Number(
            value=value,
            text=found[0],
            label=_words(between),
            called=called,
            unit=unit[1].lower() if unit else "",
            each=(unit[2] or "").lower() if unit else "",
            bound=bool(_BOUND.search(between)) or bool(_HELD & set(called)),
            equals=between.strip() == "=",
            over="/" in between,
            at=found.start(),
        )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in _WORD.findall(text))


def _unit(row: str, end: int) -> re.Match[str] | None:
    """The word behind a number, unless it is what the next number is called (`tokens 62 bytes 151`, `12 time:3`)."""
    found = _UNIT.match(row, end)
    if found is None:
        return None
    if found.start(1) == end:  # glued to it: 87.2ms, and not 11L
        return found if _is_unit(found) or found[1].lower() in _STEPS else None
    return None if re.match(r"""['"]?\s*[:=_]|\s+[-+]?\d""", row[found.end() :]) else found


def _is_unit(unit: re.Match[str]) -> bool:
    """Whether a word can be a unit, and not the beginning of what is said of the next number."""
    word = unit[1].lower()
    return word in _SECONDS or word in ("m", "b", "bytes", "mb", "mib", "kb", "kib", "bpb") or unit[2] is not None
