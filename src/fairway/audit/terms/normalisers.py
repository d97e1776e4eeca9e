"""Normalisers of something else: of a part of a row, of other logits, of a row before it was bent."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fairway.audit.terms.choices import is_mask
from fairway.audit.terms.gates import Gates
from fairway.audit.terms.rows import normalised
from fairway.audit.terms.term import Term, any_below, peel, same, walk

_GUARD = 1e-6  # of a count: what is less keeps a logarithm from nought
_SUMS = frozenset(("sum", "nansum", "fsum", "logsumexp"))
_FEW = frozenset(("topk", "sort", "narrow", "masked_select", "nonzero"))
_NUDGES = frozenset(("clamp", "clamp_min", "clip", "maximum", "max"))


def partial(gates: Gates) -> Iterator[Term]:
    """row / what only some places of the row sum to: topk(row).values.sum(), where(row > 1, row, 0).sum()."""
    for term, above, below in gates.ratios():
        row = _bare(above)
        if id(term) not in gates.inside or not gates.of.is_distribution(row) or gates.kinds(below):
            continue
        for one in gates.of.below(below):
            if one.op == "call" and one.called in _SUMS and _some_of(one.operand("a", "input"), row):
                yield term
                break


def capped(gates: Gates) -> Iterator[Term]:
    """counts / counts.sum().clamp_max(40), (p + q) / (p + q).sum(-1).clamp(max=1), counts[context] /
    totals[context].clamp_max(40): what a row sums to, and no more than some number of it."""
    for term, above, below in gates.ratios():
        counted = gates.lookups(above)
        for row in (*(row for row, _ in counted), _bare(above)):
            one = next((one for one in gates.of.below(below) if _is_capped_sum(one, row)), None)
            if one is None and any(row is held for held, _ in counted):
                one = next((one for one in gates.of.below(below) if _is_capped_total(gates, one, row, counted)), None)
            if id(term) in gates.inside and one is not None:
                yield one
                break


def _is_capped_total(gates: Gates, term: Term, row: Term, counted: list[tuple[Term, Term]]) -> bool:
    """Whether a count that is kept beside a row, under the same key, is cut off above; not a count whose own share that
    is, min(n, 40) / (min(n, 40) + 8)."""
    held = _cut_off(term)
    keys = [key for one, key in counted if one is row]
    beside = gates.lookups(held) if held is not None else []
    beside = [(one, key) for one, key in beside if not any(same(one, other, 8) for other, _ in counted)]
    return any(same(other, key, 8) for _, other in beside for key in keys)


def _cut_off(term: Term) -> Term | None:
    """What a number cuts off above."""
    if term.op != "call" or term.called not in ("clamp_max", "clamp", "clip", "minimum", "min"):
        return None
    high = term.at(1, "max", "other") if term.called in ("clamp_max", "minimum", "min") else term.at(2, "max")
    whole = high is not None and isinstance(high.constant(), (int, float))
    return _bare(term.operand("a", "input") or term.parts[0]) if whole else None


def peaked(gates: Gates) -> Iterator[Term]:
    """counts / counts.amax(-1): what a row has at most, and not what it sums to."""
    for term, above, below in gates.ratios():
        most = _greatest(below)
        if most is None or id(term) not in gates.inside or gates.kinds(below):
            continue
        whole = peel(above)
        rows = (whole, *whole.parts) if whole.op == "op" and whole.value == "+" else (whole,)
        if any(same(_bare(most), _bare(row), 8) for row in rows):
            yield term


def _greatest(term: Term) -> Term | None:
    """x of x.amax(dim), beneath .values and guards against nought, and beside what is added to it."""
    below = peel(term)
    if below.op == "op" and below.value == "+":
        return next((found for part in below.parts if (found := _greatest(part)) is not None), None)
    while below.parts:
        if below.called in ("amax", "max") and any(key in below.keys for key in ("dim", "axis", 0)):
            return below.operand("a")
        if not (below.op in ("attr", "item") or below.called in _NUDGES):
            return None
        below = peel(below.parts[0])
    return None


def floored(gates: Gates) -> Iterator[Term]:
    """(counts + s q) / counts.sum().clamp_min(s), which sums to more than one: counts.sum() + s are there."""
    for term, above, below in gates.ratios():
        whole, least = peel(above), peel(below)
        if id(term) not in gates.inside or whole.op != "op" or whole.value != "+" or least.called not in _NUDGES:
            continue
        summed = _bare(least)
        held = summed.operand("a") if summed.called in _SUMS else None
        if held is not None and any(same(_bare(part), _bare(held), 8) for part in whole.parts):
            others = [part for part in whole.parts if not same(_bare(part), _bare(held), 8)]
            if others and not any(other.op == "const" for other in others):
                yield least


def smoothed(gates: Gates) -> Iterator[Term]:
    """(counts + 0.5) / counts.sum(): what is added to every count is missing from the sum, once for every token."""
    for term, above, below in gates.ratios():
        whole, summed = peel(above), _bare(below)
        held = summed.operand("a") if summed.called in _SUMS else None
        if held is None or id(term) not in gates.inside or whole.op != "op" or whole.value != "+":
            continue
        for row, more in (whole.parts, whole.parts[::-1]):
            added = more.constant()
            if isinstance(added, (int, float)) and added > _GUARD and same(_bare(row), _bare(held), 8):
                yield term


def _is_capped_sum(term: Term, row: Term) -> bool:
    summed = _cut_off(term)
    held = summed.operand("a", "input") if summed is not None and summed.called in _SUMS else None
    return held is not None and any_below(held, lambda one: one is row or same(one, row, 8))


def _some_of(summed: Term | None, row: Term) -> bool:
    """Whether a sum goes over some places of this row, and the row that is divided is not what is left of it."""
    if summed is None or same(peel(summed), row, 8):
        return False
    below = peel(summed)
    while below.op in ("attr", "item") and not (below.op == "item" and is_mask(below.parts[1])):
        below = peel(below.parts[0])  # .values, [0]
    if below.op == "item":
        return same(peel(below.parts[0]), row, 8)
    if below.called in _FEW:
        return any(same(peel(part), row, 8) for part in below.parts[:1])
    if below.called == "where" and len(below.parts) > 2:
        return any(same(peel(part), row, 8) for part in below.parts[1:3])
    if below.op == "choice":
        return any(same(peel(part), row, 8) for part in below.parts[1:])
    masked = below.op == "op" and below.value == "*" and any(is_mask(part) for part in below.parts)
    return masked and any(same(peel(part), row, 8) for part in below.parts)


def bent(gates: Gates) -> Iterator[Term]:
    """(row / row.sum()) ** 0.85, softmax(x) ** 0.9: a row that was whole, raised to a power, and divided by nothing."""
    whole = normalised(gates)
    for term in gates.nodes:
        power = term.parts[1].constant() if _is_power(term) and len(term.parts) > 1 else None
        if not isinstance(power, (int, float)) or power == 1 or id(term) not in gates.inside or id(term) in whole:
            continue
        row = peel(term.parts[0])
        divided = row.op == "op" and row.value == "/" and gates.of.is_distribution(row)
        if row.called == "softmax" or divided:
            yield term


def stretched(gates: Gates) -> Iterator[Term]:
    """log_softmax(x) * 0.98, read at the target: the exponents no longer sum to one. A change to bits is none."""
    whole = normalised(gates)
    for term in gates.nodes:
        if term.op != "op" or term.value not in ("*", "/") or id(term) not in gates.inside or id(term) in whole:
            continue
        for row, by in (term.parts, term.parts[::-1]):
            factor = by.constant()
            if peel(row).called == "log_softmax" and isinstance(factor, (int, float)) and not _is_unit(factor):
                yield term


def shifted(gates: Gates) -> Iterator[Term]:
    """log_softmax(x) + bias, read at the target: whole before something was added, and what is added is no logarithm
    that could pay for it; log_softmax(x) + 0.1 log q of another distribution. A cross entropy makes it whole again."""
    for term in gates.nodes:
        place = gates.of.scored_place(term)
        if place is None or not gates.kinds(place) or term.called == "cross_entropy":
            continue
        base = peel(term.operand("input", "a") or term.parts[0])
        while base.op == "item":
            base = peel(base.parts[0])
        if base.op != "op" or base.value != "+":
            continue
        for row, more in (base.parts, base.parts[::-1]):
            whole = peel(row).called == "log_softmax" and peel(more).constant() is None and not gates.kinds(more)
            paid = any_below(more, lambda one: one.called in _LOGARITHMS) and not _of_another_row(more, peel(row))
            if whole and not paid:
                yield base


def _of_another_row(more: Term, whole: Term) -> bool:
    """0.1 log((counts + 1) / (counts.sum() + 1024)): a logarithm of a row by its sum, and none of what the first row
    holds, which the price of a bonus would be made of."""
    known = (whole, whole.operand("input", "a"))
    logs = [term for term in walk(more) if term.called in _LOGARITHMS and term.parts]
    if any(any_below(term, lambda one: any(one is each for each in known)) for term in logs):
        return False
    return all(term.called in _OF_ONE_ROW for term in logs) and any(_is_row(peel(term.parts[0])) for term in logs)


def _is_row(ratio: Term) -> bool:
    """(counts + 1) / (counts.sum() + 1024)"""
    if ratio.op != "op" or ratio.value != "/":
        return False
    above = peel(ratio.parts[0])
    rows = above.parts if above.op == "op" and above.value == "+" else (above,)
    summed = [one.operand("a", "input") for one in walk(ratio.parts[1]) if one.called in _SUMS]
    return any(held is not None and same(_bare(row), _bare(held), 8) for row in rows for held in summed)


_OF_ONE_ROW = frozenset(("log", "log2", "log_"))
_LOGARITHMS = frozenset(("log", "log1p", "log2", "logsumexp", "log_softmax", "logaddexp", "expm1", "log_"))


def _is_unit(factor: float) -> bool:
    return any(abs(abs(factor) - unit) < 1e-3 for unit in (1.0, math.log(2.0), 1.0 / math.log(2.0)))


def _is_power(term: Term) -> bool:
    return (term.op == "op" and term.value == "**") or (term.op == "call" and term.called in ("pow", "power"))


def of_others(gates: Gates) -> Iterator[Term]:
    """logsumexp(a) - b[target], of two different rows of logits, or of some places of one: topk(b).values; of a row
    itself and its target's logit divided by a temperature."""
    for term in gates.nodes:
        if term.op != "op" or term.value != "-" or len(term.parts) != 2:
            continue
        if id(term) in gates.inside:
            if _partly_summed(term) or _summed_unscaled(term):
                yield term
            continue
        for total, at in (term.parts, term.parts[::-1]):
            summed = _bare(total)
            if summed.called == "logsumexp" and _scaled_alone(gates, summed, _bare(at)):
                yield term
            place = gates.of.scored_place(_bare(at))
            if summed.called != "logsumexp" or place is None or not gates.kinds(place):
                continue
            one, other = summed.operand("input", "a"), peel(_bare(at).parts[0])
            if one is None or not _makes_logits(peel(one)):
                continue
            if _some_of(one, other) or not _related(peel(one), other):
                yield term


def _scaled_alone(gates: Gates, summed: Term, at: Term) -> bool:
    """Whether a row's logit at the target is scaled and the row that is summed is not."""
    row = summed.operand("input", "a")
    if row is None or at.op != "op" or at.value not in ("*", "/") or not _makes_logits(peel(row)):
        return False
    for picked, by in (at.parts, at.parts[::-1])[: 1 if at.value == "/" else 2]:
        place = gates.of.scored_place(_bare(picked))
        factor = by.constant()
        alone = not (isinstance(factor, (int, float)) and _is_unit(factor))
        if alone and place is not None and gates.kinds(place) and same(peel(row), peel(_bare(picked).parts[0]), 12):
            return True
    return False


def _partly_summed(term: Term) -> bool:
    """row - logsumexp(topk(row).values): of logits that are read at the target afterwards."""
    row, summed = peel(term.parts[0]), _bare(term.parts[1])
    return summed.called == "logsumexp" and _some_of(summed.operand("input", "a"), row) and _makes_logits(row)


def _summed_unscaled(term: Term) -> bool:
    """row / t - logsumexp(row): of logits that are read at the target afterwards."""
    row, summed = peel(term.parts[0]), _bare(term.parts[1])
    of = summed.operand("input", "a") if summed.called == "logsumexp" else None
    if of is None or row.op != "op" or row.value not in ("*", "/") or not _makes_logits(peel(of)):
        return False
    for scaled, by in (row.parts, row.parts[::-1])[: 1 if row.value == "/" else 2]:
        factor = by.constant()
        unit = isinstance(factor, int | float) and _is_unit(factor)
        if not unit and same(peel(scaled), peel(of), 12):
            return True
    return False


def _related(one: Term, other: Term) -> bool:
    """Whether one of two rows is made from the other."""
    return (
        same(one, other, 12)
        or any_below(one, lambda term: term is other or same(term, other, 6))
        or any_below(other, lambda term: term is one or same(term, one, 6))
    )


def _makes_logits(row: Term) -> bool:
    return any_below(row, lambda term: term.called in ("linear", "matmul", "forward", "()", "einsum", "tanh"))


def _bare(term: Term) -> Term:
    """Beneath changes of shape, guards against nought, and the one column that a gather gives."""
    below = peel(term)
    while True:
        if below.called in _NUDGES and below.parts:
            below = peel(below.operand("a") or below.parts[0])
        elif below.op == "item" and peel(below.parts[0]).called in ("gather", "take_along_dim", "take_along_axis"):
            below = peel(below.parts[0])
        else:
            return below


__all__ = ["bent", "capped", "floored", "of_others", "partial", "peaked", "shifted", "smoothed", "stretched"]
