"""One run for each token that may stand at the end, and what the script's probabilities of them add up to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fairway.audit.case import Case
from fairway.audit.passes.documents import SHORTEST, least_lengths, with_short
from fairway.audit.passes.reaching import around
from fairway.audit.passes.reported import Reported, scores_of
from fairway.audit.passes.trials import counts_of
from fairway.audit.terms.term import Term, peel
from fairway.audit.trial import text
from fairway.audit.trial.arrays import largest
from fairway.audit.trial.limits import Forced
from fairway.audit.trial.machine import over
from fairway.audit.trial.named import LARGEST, taken
from fairway.audit.trial.vocabulary import size_in
from fairway.audit.weighing import stream
from fairway.audit.weighing.machine import Way, Weigher
from fairway.audit.weighing.stream import PIECES
from fairway.audit.weighing.strengths import Strengths, set_by_target, stored_by_target

_NUMBERS = 34_000_000  # elements of a table of counts: 1 << 25 buckets, or PIECES ** 3; untouched, they take no memory
_STEPS = 460_000  # of all runs together
_ONE, LONG = 50_000, 90_000  # of one: a second or two, and of one that goes through the tokens one by one
PLAIN = 1e-4
_LESS = 0.998
_ALIKE = 1e-9  # of one row, worked out once for each token: a mixture may give its counts a share of 1e-5
_FAR = 3.0  # a row that sums to one comes to less, whatever the few tokens are that stand for the others
_MORE = 1.0004  # what is more is no rounding, nor an epsilon of 1e-6 for each of 320 tokens
_WHOLE = 1e-4  # from one: the tilts at hand that read the target come to 0.90 or 1.01 and more

_READING = frozenset(("gather", "take_along_dim", "take_along_axis", "neg", "negative", "nll_loss"))
_WINDOWS = ("history", "seq", "window", "context", "ctx", "span", "stride", "_len", "L", "T")
_TABLES = ("bucket", "hash", "table", "rows", "slots", "memory")
_CHUNKS = ("chunk", "segment", "region", "block")
_BATCHES = ("eval_tokens", "eval_batch", "val_batch", "batch_tokens")
_WINDOWED = ("eval_batch", "val_batch", "batch_windows", "batch_seqs")
_GROUPED = (
    *(f"{each}_{many}" for each in _CHUNKS for many in ("windows", "blocks")),
    *(f"{many}_per_{each}" for each in _CHUNKS for many in ("windows", "blocks")),
    *("chunk_seqs", "chunk_batches"),
)
_LEAST = 8  # tokens of documents that something is learned from: those of the text are short
_PAIR = 2  # windows of a batch: a cache that learns after each batch has something to say in the second
_FEW = 4  # bits of a hash: so few buckets that contexts meet, as millions of them do in those of a script
_ROOMY = 20  # bits of a table in which 320 contexts hardly ever meet: filling a larger one takes a second
_MANY = 1_000  # rows: fewer are none of a hashed table
_BITS = range(10, 30)


@dataclass(frozen=True)
class Weight:
    """total: what the probabilities add up to; line: where a row, or the price, is made that is to blame; differs:
    whether each token is read from a row over all of them, and that row is another for another token; gate: where
    that is more than one and the bonus of a hint is another for another token, the line that sets it; stored: the first
    line that writes other numbers into an array for another token, 0 where none was seen to; same: whether every token
    is read from the one row."""

    total: float
    line: int
    differs: bool = False
    gate: int = 0
    stored: int = 0
    same: bool = False

    @property
    def whole(self) -> bool:
        """Whether they add up to one, but for rounding."""
        return abs(self.total - 1.0) < _WHOLE

    @property
    def too_much(self) -> bool:
        return self.total > _MORE


def weighed(case: Case, which: Reported) -> Weight | None:
    """The most that the probabilities of the last token add up to in the score; None where the trial cannot say, or
    where the model alone says them."""
    found = _in_tables(case, ways_of(case, which))
    if found is not None and found.too_much:
        return found
    counts = with_short(case, which)
    # All documents of the text are shorter than that: of the first one the last one may know something.
    short = least_lengths(case, stream.TOKENS, stream.TOKENS) if counts is not None else ()
    other = _in_tables(case, counts.said[-1].sum.ways(), short) if counts is not None and short else None
    return other if other is not None and (other.too_much or found is None) else found


def _in_tables(case: Case, ways: set[Way], more: tuple[Forced, ...] = ()) -> Weight | None:
    """more: numbers that are taken for others besides."""
    if not ways:
        return None
    few = tables(case)  # where contexts meet, long ones may have nothing to say
    met: set[tuple[int, int]] = set()
    for small in [few, ()] if few else [()]:
        if few and not small and met.isdisjoint((each.limit, each.value) for each in few):
            return None  # there are no such tables: the same once more
        found = _weighed(case, ways, small, met=met, more=more)
        if found is not None and found.total < _LESS:  # what is short here may be too much in another context
            turned = (_weighed(case, ways, small, each, more=more) for each in stream.TURNS)
            return next((each for each in turned if each is not None and each.too_much), found)
        if found is not None:
            return found
    return None


def of_itself(case: Case, which: Reported) -> Weight | None:
    """The same behind a token that was never met, where it is too much: what is asked for a token holds it already.
    Else what never came before is no likelier than the model says, and one trial is enough to see that."""
    ways, few = ways_of(case, which), tables(case)
    never = int(stream.ALPHABET[-1])
    for small in [(), few] if few else [()]:  # where contexts meet, it was met all the same
        run = over_text(case, stream.text(never, stream.FRESH), small)
        said = [abs(price) for way, price in run.said.items() if way in ways and not run.unsure(way)]
        if run.trial.complete and said:
            better = min(said) < stream.losses()[stream.TOKENS - 2, never] - PLAIN
            found = _weighed(case, ways, small, stream.FRESH) if better else None
            return found if found is not None and found.too_much else None
    return None


def ways_of(case: Case, which: Reported) -> set[Way]:
    """The calls that make the losses of the score. A script that goes through the tokens one by one may be too long for
    the trial's text, and come to the end of this one: there the last calls are meant that say a price where the walk
    sees a loss of the score, else the last ones of all."""
    counts = counts_of(case, which, doubtful=True)
    if counts is not None:
        return counts.said[-1].sum.ways()
    run = over_text(case, stream.text(None), tables(case), LONG) if not case.trial.complete else None
    if run is None or not run.trial.complete:
        return set()
    lines = {score.place.line for score in scores_of(case.trace, which.score, which.data)}
    seen = [way for way in run.paid if not lines.isdisjoint(way)] or _nearest(case, list(run.paid), lines)
    return set((seen or list(run.paid))[-1:])


def _nearest(case: Case, ways: list[Way], lines: set[int]) -> list[Way]:
    """The way whose sum stands nearest to a loss of its own function, in one of these lines."""
    found = [
        (abs(way[-1] - line), way)
        for way in ways
        for line in lines
        if around(case, way[-1]) is around(case, line)  # the sum of a loss stands where the loss is made
    ]
    return [min(found)[1]] if found else []


def _weighed(
    case: Case,
    ways: set[Way],
    small: tuple[Forced, ...],
    turned: int = 0,
    met: set[tuple[int, int]] | None = None,
    more: tuple[Forced, ...] = (),
) -> Weight | None:
    """turned: the context that the text ends in; met: is given the numbers that were taken for others; more: such."""
    said: dict[int, dict[Way, float]] = {}
    rows: list[NDArray[np.float64] | None] = []
    runs: list[Weigher] = []
    bonuses: list[Strengths] = []
    line = models = 0
    tried = stream.alternatives(turned)
    waiting = list(tried)
    while waiting:
        last = waiting.pop(0)
        run = over_text(case, stream.text(last, turned), small, more=more)
        if met is not None:
            met |= run.limits.taken
        if len(tried) * run.trial.steps > _STEPS:
            return None
        here = {way: price for way, price in run.said.items() if way in ways and not run.unsure(way)}
        if not run.trial.complete or not here:
            return None
        said[last] = here
        runs = [*runs, run][:2]
        bonuses.append(run.strengths)
        rows.append(run.row_of(next(reversed(here.values())), last))
        line = line or _to_blame(run)
        plain = stream.losses()[stream.TOKENS - 2, last]
        if all(abs(abs(price) - plain) < PLAIN for price in here.values()):
            models += 1
            if models == len(said) == 2:
                return None
        waiting = _to_ask([each for each in tried if each not in said], rows)
    known = [row for row in rows if row is not None]
    if _same(rows) is not None:
        # Of a table of hashed pairs each token has a bucket of its own, and a few do not stand for all: the row does.
        total, shared = float(known[0].sum()), set.intersection(*(set(each) for each in said.values()))
        most = runs[0].most_read(shared) if total < _LESS else 0.0  # too much at another place
        return Weight(most if most > _MORE else total, line, same=True)
    shared = set.intersection(*(set(each) for each in said.values()))
    total = max(
        (_total([each[way] for each in said.values()], [tried[each] for each in said]) for way in shared), default=0.0
    )
    if total <= 0.0:
        return None
    if len(known) < len(rows):
        others = [said[each] for each, _ in stream.OTHERS]
        if _MORE < total < _FAR and not _stand_for_others(case, others, small, turned):
            return None
        gate = set_by_target(bonuses) if total > _MORE else 0
        return Weight(total, line, gate=gate, stored=stored_by_target(bonuses))
    gated = all(abs(float(row.sum()) - 1.0) < PLAIN for row in known)
    return Weight(total, _parting(*runs[:2]) or line if gated else line, differs=gated)


def _to_ask(left: list[int], rows: list[NDArray[np.float64] | None]) -> list[int]:
    """Of the tokens that were not tried yet: where those of all kinds, and what a cache would say, are read from one
    row, only what that row makes likelier than the model does. A trial takes 0.1 to 0.2 s."""
    row = _same(rows)
    if row is None or not stream.TELLING.isdisjoint(left):
        return left
    plain = np.exp(-stream.losses()[stream.TOKENS - 2])
    return [each for each in left if row[each] > plain[each] * (1 + PLAIN)]


def _same(rows: list[NDArray[np.float64] | None]) -> NDArray[np.float64] | None:
    """The row that every token is read from, where it is always the same one."""
    first = rows[0]
    for row in rows:
        if first is None or row is None or not np.allclose(row, first, rtol=0.0, atol=_ALIKE):
            return None
    return first


def _stand_for_others(case: Case, others: list[dict[Way, float]], small: tuple[Forced, ...], turned: int) -> bool:
    """Whether two tokens that alternatives stand for are priced as one of these is, that which begins a word or that
    which does not: not where each has a place of its own in a table of hashed pairs, of which a few say nothing of the
    sum."""
    for twin in stream.TWINS:
        run = over_text(case, stream.text(twin, turned), small)
        asked = [
            all(abs(run.said.get(way, math.inf) - price) <= PLAIN for way, price in said.items()) for said in others
        ]
        if not any(asked):
            return False
    return True


def _parting(one: Weigher, other: Weigher) -> int:
    """The first line that made another row for another token; 0 where they went other ways."""
    for (line, row), (line_b, row_b) in zip(one.trail, other.trail, strict=False):
        if line != line_b:
            return 0
        if not np.array_equal(row, row_b, equal_nan=True):
            return line
    return 0


def _total(prices: list[float], many: list[int]) -> float:
    """sum of exp(-loss); of exp(log p) where a script sums those: a loss is not below nought."""
    sign = -1.0 if sum(prices) >= 0.0 else 1.0
    return sum(count * math.exp(min(sign * price, 700.0)) for price, count in zip(prices, many, strict=True))


def _to_blame(run: Weigher) -> int:
    """The first line, of those that follow each other again and again, whose rows sum to more than one; else the last
    that makes a price."""
    found: list[int] = []
    for line in reversed(run.rows):
        if line in found and line != found[-1]:
            break
        found.append(line)
    return found[-1] if found else run.mixed


def is_whole(loss: Term) -> bool:
    """Whether a loss is read off a softmax as it is: cross_entropy(...), -log_softmax(...)[target]."""
    below = peel(loss)
    while below.parts and (below.op in ("item", "op") or below.called in _READING):
        if below.op == "op" and len(below.parts) > 1 and below.parts[1].op != "const":
            return False
        below = peel(below.operand("input", "a") or below.parts[0] if below.op == "call" else below.parts[0])
    return below.called in ("cross_entropy", "log_softmax", "CrossEntropyLoss")


def over_text(
    case: Case,
    ids: NDArray[np.uint16],
    small: tuple[Forced, ...],
    steps: int = _ONE,
    more: tuple[Forced, ...] = (),
) -> Weigher:
    """small: what makes tables of hashed contexts small enough; steps: what is too many; more: numbers that are taken
    for others after all."""
    given, room = text.given.set(ids), largest.set(_NUMBERS)
    try:
        forced = (*_sizes(case), *(small or tables(case, _ROOMY)), *more)
        return over(partial(Weigher, case.script, case.settings, most=steps), stream.TOKENS, forced)
    finally:
        text.given.reset(given)
        largest.reset(room)


def _sizes(case: Case) -> tuple[Forced, ...]:
    """The vocabulary, windows, batches and chunks that are longer than the text: rows over all pieces for each place of
    them take the time, and in one chunk nothing is learned before. Chunks that are shorter than that are parts of a
    document, and of the last document there should be several."""
    size = partial(taken, case.script, case.settings, text=stream.TOKENS)
    return (
        *(Forced(None, size_in(case.script.text), PIECES, word) for word in ("vocab", "V")),
        *size(_WINDOWS, range(stream.WINDOW + 1, LARGEST), stream.WINDOW),
        *size(_CHUNKS, range(stream.TOKENS + 1, LARGEST), stream.WINDOW),
        *size(_CHUNKS, range(stream.WINDOW + 1, stream.TOKENS + 1), stream.WINDOW // 2),
        *size(_BATCHES, range(_MANY, LARGEST), 8 * stream.WINDOW),
        *size(_WINDOWED, range(_PAIR + 1, _MANY), _PAIR),
        *size(_GROUPED, range(_PAIR + 1, LARGEST), _PAIR),
        *size(SHORTEST, range(_LEAST + 1, LARGEST), _LEAST),
    )


def tables(case: Case, most: int = _FEW) -> tuple[Forced, ...]:
    """Tables of hashed contexts with few buckets, of at most so many bits. `rows = 1 << bits` of few bits is few
    already, and no bits."""
    bits = ("bits", "log2")
    return (
        *taken(case.script, case.settings, _TABLES, range(max(_MANY, 1 << most), LARGEST), 1 << most),
        *(
            Forced(None, number, most, word)
            for number in _BITS
            if number > most
            for word in (bits if number == 1 << most else (*_TABLES, *bits))
        ),
    )


__all__ = ["LONG", "PLAIN", "Weight", "is_whole", "of_itself", "over_text", "tables", "ways_of", "weighed"]
