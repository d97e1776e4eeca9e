"""Ratios of counts, spread probabilities and sums of weights in a contribution to the score."""

import math
from collections.abc import Iterator

from fairway.audit.terms.choices import forked, options
from fairway.audit.terms.gates import Gates
from fairway.audit.terms.keys import folds, is_hashed, spans_vocabulary
from fairway.audit.terms.term import Term, alternatives, any_below, layers, peel, same


def gold_ratios(gates: Gates) -> Iterator[Term]:
    """Divisions of a hashed count whose key holds one token more than that of the count below."""
    for term, above, below in gates.ratios():
        upper, lower = gates.lookups(above), gates.lookups(below)
        lower_tokens = [token for _, key in lower for token in gates.tokens(key)]
        if not lower:
            continue
        for _, key in upper:
            if not is_hashed(key, gates.of.streams) or spans_vocabulary(key, gates.of.streams):
                continue
            more = [token for token in gates.tokens(key) if not any(same(token, other, 10) for other in lower_tokens)]
            if more and not _is_row_of(key, more, [other for _, other in lower], gates):
                yield term


def _is_row_of(key: Term, more: list[Term], lower: list[Term], gates: Gates) -> bool:
    """Whether the upper count stands in the row that the lower one counts, at a place of the token's own: rows that
    share their counts share their sum, too, and the places of a row sum to it."""
    own = any_below(key, lambda t: any(same(t, other, 10) for other in lower))
    return own and not folds(key, more, gates.of.streams)


def wrongly_divided(gates: Gates) -> Iterator[Term]:
    """Hashed counts of all tokens, divided by what is not their sum. Answers of yes and no share nothing: the counts of
    one question are a distribution with what they lack."""
    if any(term.called.startswith("binary_cross_entropy") for term in gates.nodes):
        return
    for term, above, below in gates.ratios():
        rows = [
            (lookup, key)
            for lookup, key in gates.lookups(above)
            if spans_vocabulary(key, gates.of.streams) and is_hashed(key, gates.of.streams)
        ]
        if rows and not any_below(below, lambda t, rows=rows: _sums(t, rows)):  # type: ignore[misc]
            lower = gates.lookups(below)
            if lower and not any(spans_vocabulary(key, gates.of.streams) and _is_summed(below) for _, key in lower):
                yield term


def counted_otherwise(gates: Gates) -> Iterator[Term]:
    """A whole row of counts, divided by a count whose key is another than the row's: contexts that meet in the row are
    counted apart below, or the other way round."""
    for term, above, below in gates.ratios():
        rows = [(row, key) for row, key in gates.lookups(above) if _is_wide(row, gates)]
        lower = gates.lookups(below)
        if not rows or not lower or any_below(below, lambda t, rows=rows: _sums(t, rows)):  # type: ignore[misc]
            continue
        keys = [key for _, key in (*rows, *lower)]
        apart = not any(same(own, other, 10) for _, own in rows for _, other in lower)
        if (
            apart
            and any(is_hashed(key, gates.of.streams) for key in keys)
            and not any(gates.kinds(key) for key in keys)
        ):
            yield term


def _is_wide(row: Term, gates: Gates) -> bool:
    """table[context] of a table that is filled at [context, token]."""
    if row.op != "item" or row.parts[1].op in ("tuple", "slice"):
        return False
    places = (
        one.parts[1] for one in layers(peel(row.parts[0])) if one.op in ("store", "mutate") and len(one.parts) > 1
    )
    return any(
        place.op == "tuple" and len(place.parts) == 2 and all(map(gates.of.streams.from_tokens, place.parts))
        for place in places
    )


def _sums(term: Term, rows: list[tuple[Term, Term]]) -> bool:
    """A sum over the same counts."""
    if term.op != "call" or term.called not in ("sum", "nansum", "norm", "fsum", "softmax"):
        return False
    return any(any_below(term, lambda t, row=row: t is row or same(t, row, 8)) for row, _ in rows)  # type: ignore[misc]


def _is_summed(term: Term) -> bool:
    return any_below(term, lambda t: t.op == "call" and t.called in ("sum", "nansum", "fsum"))


def unbalanced(gates: Gates) -> Iterator[Term]:
    """a P + b Q inside a logarithm with numbers a and b that do not sum to one; and counts added to a row that was
    already whole."""
    divided = {id(below) for term in gates.nodes for below in _made_whole(term)}
    for term in gates.nodes:
        if id(term) not in gates.inside or id(term) in divided:
            continue
        if term.op == "op" and term.value == "+":
            weights = [_weight(part, gates) for part in term.parts]
            if None not in weights and abs(sum(w for w in weights if w is not None) - 1.0) > 1e-4:
                yield term
        elif term.op == "store":
            yield from _whole_before(term)


def _made_whole(term: Term) -> Iterator[Term]:
    """What is added up in a row that is divided by its own sum: row / row.sum(), also where the row is a place in a
    table that was stored before."""
    if term.op != "op" or term.value != "/" or not _is_summed(term.parts[1]):
        return
    row = peel(term.parts[0])
    if not any_below(term.parts[1], lambda t: t is row or same(t, row, 6)):
        return
    waiting, steps = [row], 0
    while waiting and steps < 60:
        one = peel(waiting.pop())
        steps += 1
        yield one
        if one.op in ("store", "item", "merge", "choice", "attr"):
            if one.op == "store":
                waiting.append(one.parts[2])
            waiting.extend(one.parts[1:] if one.op == "choice" else one.parts if one.op == "merge" else one.parts[:1])


def undivided(gates: Gates) -> Iterator[Term]:
    """A row of a memory that is mixed in divided by its largest entry, its length and the like instead of its sum."""
    whole = {id(below) for term in gates.nodes for below in _made_whole(term)}
    whole |= {id(b) for t in gates.nodes if t.called in _SOFTENING for b in gates.of.below(*t.parts)}
    for term in gates.nodes:
        if id(term) in gates.inside and id(term) not in whole and term.op == "op" and term.value == "+":
            for row, under, where in (found for part in term.parts for found in _divided(part)):
                if id(row) not in whole and _is_another_size(gates, row, under):
                    yield where


def greatest(gates: Gates) -> Iterator[Term]:
    """The larger of several distributions token by token, which nothing divides by its sum afterwards."""
    whole = {id(below) for term in gates.nodes for below in _made_whole(term)}
    whole |= {id(b) for t in gates.nodes if t.called in _SOFTENING for b in gates.of.below(*t.parts)}
    for term in gates.nodes:
        if id(term) not in gates.inside or id(term) in whole or term.called not in ("maximum", "fmax", "max", "amax"):
            continue
        among = options(term)
        if len(among) == 1:
            stacked = peel(among[0])
            listed = stacked.operand("tensors", "arrays") if stacked.called in ("stack", "cat") else None
            among = list(listed.parts) if listed is not None and listed.op in ("list", "tuple") else []
        if sum(any_below(part, lambda t: t.called in ("softmax", "log_softmax")) for part in among) >= 2 and not any(
            gates.kinds(part) for part in among
        ):
            yield term


_SOFTENING = frozenset(("softmax", "log_softmax", "normalize", "logsumexp"))
_OTHER_SIZES = frozenset(("max", "amax", "mean", "median", "std", "norm", "numel", "count_nonzero", "len"))


def _divided(
    term: Term, under: tuple[tuple[Term, Term], ...] = (), depth: int = 6
) -> Iterator[tuple[Term, Term, Term]]:
    """(factor, divisor, division) for each factor of a product and each thing that it is divided by."""
    for one in alternatives(term, 8):
        if one.op == "op" and one.value == "*" and depth:
            for part in one.parts:
                yield from _divided(part, under, depth - 1)
        elif one.op == "op" and one.value == "/" and depth:
            yield from _divided(one.parts[0], (*under, (one.parts[1], one)), depth - 1)
        else:
            yield from ((one, divisor, division) for divisor, division in under)


def _is_another_size(gates: Gates, row: Term, divisor: Term) -> bool:
    """r.max() for a row r of a memory, over all tokens."""
    under = peel(divisor)
    while under.called in ("clamp_min", "clamp", "clip", "maximum") and under.parts:  # a guard against nought
        under = peel(under.operand("a") or under.parts[0])
    if under.op == "item" and peel(under.parts[0]).called in ("max", "median"):  # r.max(-1, keepdim=True)[0]
        under = peel(under.parts[0])
    operand = under.operand() if under.op == "call" and under.called in _OTHER_SIZES else None
    wide = gates.of.streams.is_memory(row) and gates.of.is_distribution(row)
    return wide and operand is not None and same(peel(operand), row, 8)


def unpaid_bonus(gates: Gates) -> Iterator[Term]:
    """loss - bonus * (hint == target) where nothing that reads the hint's own probability is added."""
    for term in gates.nodes:
        if id(term) not in gates.inside and term.op == "op" and term.value == "*":
            kinds = [gates.kinds(part) for part in term.parts]
            match = next((part for part, kind in zip(term.parts, kinds, strict=True) if kind == {"match"}), None)
            other = next((part for part, kind in zip(term.parts, kinds, strict=True) if not kind), None)
            bonus = match is not None and other is not None and not gates.of.is_distribution(other)  # one-hot * row
            alone = bonus and not gates.has_other_place(gates.of.term)
            if alone and match is not None and _is_hint(gates, match):
                yield term


def unpaid_floor(gates: Gates) -> Iterator[Term]:
    """A number for every token that a short list lacks, beside a loss within the list that gives nothing up for it."""
    for term in gates.nodes:
        fork = forked(term)
        if fork is None or gates.kinds(fork[0]) != {"match"}:
            continue
        inside = id(term) in gates.inside
        for arm, other in (fork[1:], fork[:0:-1]):
            number = _filled_with(other)
            lifts = number is not None and (_LEAST <= number < 1.0 if inside else 0.0 < number <= -math.log(_LEAST))
            if lifts and gates.kinds(arm) and not _gives_up(arm):
                yield term


_LEAST = 1e-5  # of a probability; a guard against log 0 is 1e-9 or less


def _filled_with(term: Term) -> float | None:
    """The number that a constant, or a tensor filled with one, has."""
    below = peel(term)
    if below.called in ("full", "full_like", "new_full", "scalar_tensor") and len(below.parts) > 1:
        below = peel(below.at(1, "fill_value") or below)
    value = below.constant()
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _gives_up(term: Term, depth: int = 12) -> bool:
    """Whether a number is added to a loss, or a probability is multiplied by one, on the way down to its softmax."""
    below = peel(term)
    if below.op == "op" and below.value in ("+", "-", "*", "/"):
        if any(part.op in ("const", "env") and part.value != 1 for part in map(peel, below.parts)):
            return True
        return depth > 0 and any(_gives_up(part, depth - 1) for part in below.parts)
    if below.op in ("choice", "merge") or below.called in _THROUGH:
        parts = below.parts[1:] if below.op == "choice" else below.parts
        return depth > 0 and any(_gives_up(part, depth - 1) for part in parts)
    return below.op == "op" and below.value == "neg" and _gives_up(below.parts[0], depth - 1)


_THROUGH = frozenset(("log", "exp", "sum", "gather", "log1p", "squeeze", "logaddexp", "add", "sub", "mul", "div"))


def _is_hint(gates: Gates, match: Term) -> bool:
    """hint == target, not target == padding."""
    for term in gates.of.below(match):
        equals = (term.op == "compare" and term.value == "==") or term.called == "eq"
        if equals and all(peel(part).op not in ("const", "env", "attr") for part in term.parts[:2]):
            return True
    return False


def _weight(term: Term, gates: Gates) -> float | None:
    """The number that a distribution is multiplied by."""
    below = peel(term)
    if below.op != "op" or below.value != "*":
        return None
    for number, other in (below.parts, below.parts[::-1]):
        value = number.constant()
        if isinstance(value, float) and 0.0 < value < 1.0 and gates.of.is_distribution(other):
            return value
    return None


def _whole_before(term: Term) -> list[Term]:
    """For row[token] += share: what the row was before, where that is a distribution that nothing has scaled down."""
    row, index, value = term.parts
    if value.op != "op" or value.value != "+" or not any(_reads(part, row, index) for part in value.parts):
        return []
    share = next((part for part in value.parts if not _reads(part, row, index)), None)
    if share is None or not any_below(share, lambda t: t.op == "op" and t.value == "/"):
        return []
    first = _before_stores(row)
    return first[:1] if first and all(_is_whole(peel(one)) for one in first) else []


def _reads(term: Term, row: Term, index: Term) -> bool:
    return term.op == "item" and term.parts[0] is row and (term.parts[1] is index or same(term.parts[1], index))


def _before_stores(row: Term) -> list[Term]:
    """What a row was before anything was added to it."""
    found: list[Term] = []
    waiting = [row]
    seen: set[int] = set()
    while waiting and len(seen) < 60:
        term = waiting.pop()
        below = peel(term)
        if id(term) in seen:
            continue
        seen.add(id(term))
        if below.op in ("merge", "choice"):
            waiting.extend(below.parts[1:] if below.op == "choice" else below.parts)
        elif below.op == "store":
            waiting.append(below.parts[0])
        else:
            found.append(term)
    return found


def _is_whole(term: Term) -> bool:
    """A row of a normalised table: looked up, or divided by its sum; not one that was multiplied by a share."""
    if term.op == "item":
        return any_below(term.parts[0], lambda t: t.op == "call" and t.called in ("sum", "softmax"))
    if term.op == "call" and term.called == "softmax":
        return True
    return term.op == "op" and term.value == "/" and _is_summed(term.parts[1])


def spread_over_bytes(gates: Gates) -> Iterator[Term]:
    """p ** (1 / bytes of the target), or nll / bytes inside the logarithm of a mixture."""
    for term in gates.nodes:
        if len(term.parts) < 2:
            continue
        power = (term.op == "op" and term.value == "**") or term.called in ("pow", "power", "float_power")
        share = id(term) in gates.inside and term.op == "op" and term.value == "/" and _is_length(term.parts[1])
        if (power or share) and _depends(gates, term.parts[0], term.parts[1]):
            yield term


def _depends(gates: Gates, base: Term, other: Term) -> bool:
    return "score" in gates.kinds(base) and "read" in gates.kinds(other)


def _is_length(term: Term) -> bool:
    return any_below(term, lambda t: t.op == "call" and t.called in ("len", "encode", "numel"))
