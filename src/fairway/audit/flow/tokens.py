"""Which tokens a value comes from: symbolic slices of a data set, told apart by the loops that cut them out.

A loop is walked twice, its first iteration and a later one. What iteration 2 of the chunk loop cuts out of the
validation tokens carries the span (chunk loop, 2, 2); it cannot be what iteration 1 cut out. Two slices that no loop
that both depend on keeps apart are taken to overlap: a second pass over the same chunks has the same spans.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Span: TypeAlias = tuple[int, int, int]
"""(loop, first iteration, last iteration); iteration 2 stands for any later one."""

Cut: TypeAlias = tuple[Literal["head", "tail"], str, frozenset[str]]
"""A part within one window or list: `[:e]` is ("head", e, what e subtracts), `[e:]` is ("tail", ...)."""

ALL_BEFORE = "^"
"""Before the end of a cut: of several windows, that of the first one, and of all of them only what lies before it."""

START, END = -(10**6), 10**6
_OWNER = re.compile(r"\b[A-Za-z_]\w*\.(?=[A-Za-z_])")
UNNAMED = "file:"  # then a path, in which nothing says whether training or validation text lies there
UNTOLD = "file:?"  # then the number of a read: of a file whose name is not known, and which may be that of another read
MOST = 12  # slices that a value remembers one by one; more are merged


@dataclass(frozen=True)
class Tok:
    """A slice of a data set.

    data: "val", "train", "generated", "random", or "file:..." where nothing tells what it is
    spans: the loop iterations that it depends on, sorted by loop
    cuts: parts within a window; part: how a constant cut it short ("" for all of it)
    shift: 1 for `[1:]`, which is what follows the tokens of shift 0
    wide: windows longer than the step from one to the next: they overlap; step: that step, where it is a number
    ranked: the share of one process among several; origin: which of the trace's reads it came from
    ordered: cut out where a sort by lengths has put it; pushed: from a beginning that the end of the data pushes back
    """

    data: str
    spans: tuple[Span, ...] = ()
    cuts: frozenset[Cut] = frozenset()
    part: str = ""
    shift: int = 0
    wide: bool = False
    step: int = 0
    ranked: bool = False
    origin: int = -1
    ordered: bool = False
    pushed: bool = False


def part_of(limit: float) -> str:
    """How much a constant lets through, as a Tok's part: so many, or a share below 1."""
    return f"{limit:.0f}" if limit >= 1 else f"{limit:g}"


def narrowed(tok: Tok, spans: Iterable[Span]) -> Tok:
    """The slice that also depends on these iterations. A beginning of what was cut in one turn, `window[: length]`, is
    of that turn, and of no turn before it."""
    own = {loop for loop, low, _ in tok.spans if low != START}
    new = [each for each in spans if each[1] != START or each[0] not in own]
    return replace(tok, spans=merged_spans(tok.spans, new, keep_new=True))


def merged_spans(old: Sequence[Span], new: Iterable[Span], keep_new: bool = False) -> tuple[Span, ...]:
    """Both; where both know a loop, the newer iteration (`keep_new`) or the hull of the two."""
    if not old or not new:
        return tuple(old) or tuple(new)
    table = {loop: (low, high) for loop, low, high in old}
    for loop, low, high in new:
        if loop in table and not keep_new:
            low, high = min(low, table[loop][0]), max(high, table[loop][1])
        table[loop] = (low, high)
    return tuple(sorted((loop, low, high) for loop, (low, high) in table.items()))


def cut_apart(one: Iterable[Cut], other: Iterable[Cut]) -> bool:
    """Whether one is before and the other after the same place: `[:-s]` and `[-s:]`, `[:n-s]` and `[n-s:]`.

    A slice that has both ends itself, `[low-s:high-s]`, holds something: these two ends keep nothing apart.
    """
    one, other = frozenset(one), frozenset(other)
    if _one_beginning(one, other):
        return False
    for cut in one:
        for cut_b in other:
            if cut[0] == cut_b[0] or {cut, cut_b} <= one or {cut, cut_b} <= other:
                continue
            if _ends_before(cut[1], cut[2], cut_b[1], cut_b[2], cut[0] == "head"):
                return True
    return False


def _one_beginning(one: frozenset[Cut], other: frozenset[Cut]) -> bool:
    """Whether two slices of two ends each begin at one place: `[w.first - w.begin : ...]`, whatever w is called."""
    begins = [[_unowned(cut) for cut in cuts if cut[0] == "tail"] for cuts in (one, other)]
    both = len(one) == len(other) == 2 and all(len(each) == 1 for each in begins)
    return both and begins[0] == begins[1]


def _unowned(cut: Cut) -> Cut:
    """A cut whose ends are named by attributes alone, whosesoever they are."""
    return cut[0], _OWNER.sub("", cut[1]), frozenset(_OWNER.sub("", each) for each in cut[2])


def perhaps_apart(learned: Tok, scored: Tok) -> bool:
    """Whether what was learned ends at a place that may lie before all that is scored, and nothing tells how they lie.

    Told is: learned without an end of its own, or from a beginning that lies as the scored one's; two ends that differ
    by numbers alone.
    """
    ends = [cut for cut in learned.cuts - scored.cuts if cut[0] == "head"]
    begins = [cut for cut in scored.cuts if cut[0] == "tail"]
    if not ends or not begins or any(_unowned(cut) in map(_unowned, begins) for cut in learned.cuts):
        return False
    return not any(_comparable(end, begin) for end in ends for begin in begins)


def _comparable(one: Cut, other: Cut) -> bool:
    """Whether numbers, or the one being the other and more, say how two ends lie to each other."""
    if one[1].startswith(f"add({other[1]},"):
        return True
    if all(each[1].lstrip("-").isdigit() for each in (one, other)):
        return one[1].startswith("-") is other[1].startswith("-")
    named, named_b = _apart_from_numbers(one[2])[0], _apart_from_numbers(other[2])[0]
    return bool(named) and named == named_b


def _ends_before(end: str, less: frozenset[str], end_b: str, less_b: frozenset[str], first: bool) -> bool:
    """Whether the head ends where the tail begins, or before. first: the former is the head."""
    if end == end_b:
        return True
    head, tail = ((end, less), (end_b, less_b)) if first else ((end_b, less_b), (end, less))
    if all(each[0].lstrip("-").isdigit() for each in (head, tail)):
        ends = int(head[0]), int(tail[0])
        return ends[0] <= ends[1] and (ends[0] < 0) is (ends[1] < 0)
    (named, moved), (named_b, moved_b) = _apart_from_numbers(head[1]), _apart_from_numbers(tail[1])
    if not (named or named_b):
        return bool(less) and less == less_b
    return named == named_b and moved <= moved_b


def _apart_from_numbers(less: frozenset[str]) -> tuple[frozenset[str], int]:
    """What is subtracted by name, and by how much numbers move the end: "32" is subtracted, "+32" is added."""
    named = frozenset(each for each in less if not each.lstrip("+").isdigit())
    numbers = [each for each in less if each not in named]
    return named, sum(int(each) if each.startswith("+") else -int(each) for each in numbers)


def related(learned: Tok, scored: Tok, order: Sequence[int] = ()) -> Literal["apart", "earlier", "later", "same"]:
    """How the tokens that were learned from lie to those that are scored. order: the loops, outermost first.

    "same" where they overlap or nothing tells them apart; "apart" for another data set or another part of a window.
    """
    if learned.data != scored.data or cut_apart(learned.cuts, scored.cuts):
        return "apart"
    spans = {loop: (low, high) for loop, low, high in scored.spans}
    verdicts: dict[int, Literal["earlier", "later"]] = {}
    for loop, low, high in learned.spans:
        if loop in spans:
            if high < spans[loop][0]:
                verdicts[loop] = "earlier"
            elif low > spans[loop][1]:
                verdicts[loop] = "later"
    for loop in order:
        if loop in verdicts:
            return verdicts[loop]
    return next(iter(verdicts.values()), "same")


def merged(toks: Iterable[Tok]) -> frozenset[Tok]:
    """At most MOST slices: where there are more, those of one part of a window, else of one data set, become one that
    covers them all."""
    kept = frozenset(toks)
    if len(kept) > MOST:
        kept = _hulls(kept, lambda tok: (tok.data, tok.shift, tok.cuts))
    return kept if len(kept) <= MOST else _hulls(kept, lambda tok: (tok.data, tok.shift))


def _hulls(toks: frozenset[Tok], key: Callable[[Tok], Hashable]) -> frozenset[Tok]:
    groups: dict[Hashable, list[Tok]] = {}
    for tok in toks:
        groups.setdefault(key(tok), []).append(tok)
    return frozenset(_hull(group) for group in groups.values())


def _hull(group: list[Tok]) -> Tok:
    """One slice that covers them all: of the loops that all of them know, from the earliest turn to the latest."""
    first = group[0]
    ends: dict[int, list[int]] = {loop: [1, low, high] for loop, low, high in first.spans}
    for tok in group[1:]:
        for loop, low, high in tok.spans:
            end = ends.get(loop)
            if end is not None:
                end[0] += 1
                end[1] = low if low < end[1] else end[1]
                end[2] = high if high > end[2] else end[2]
    spans = tuple(sorted((loop, low, high) for loop, (many, low, high) in ends.items() if many == len(group)))
    cuts = frozenset.intersection(*(tok.cuts for tok in group))
    part = first.part if all(tok.part for tok in group) else ""
    wide, ranked = all(tok.wide for tok in group), all(tok.ranked for tok in group)
    step, origin = max(tok.step for tok in group), min(tok.origin for tok in group)
    ordered, pushed = any(tok.ordered for tok in group), all(tok.pushed for tok in group)
    return Tok(first.data, spans, cuts, part, first.shift, wide, step, ranked, origin, ordered, pushed)
