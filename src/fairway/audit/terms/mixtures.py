"""Ratios of counts, spread probabilities and sums of weights in a contribution to the score."""

import math
from collections.abc import Iterator
from itertools import islice

from fairway.audit.terms.choices import forked
from fairway.audit.terms.gates import Gates, bounds_of
from fairway.audit.terms.keys import folds, is_hashed, spans_vocabulary
from fairway.audit.terms.octets import negated
from fairway.audit.terms.rows import is_summed, is_wide, made_whole
from fairway.audit.terms.term import Term, any_below, peel, same, walk

_NEARLY = 0.99  # a probability that is held below that of a rounded softmax loses nothing
_CUT = frozenset(("clamp", "clip", "clamp_max", "minimum", "min"))
_SOME = 60  # terms: of strengths that are put in place by hand, of what is read beside a loss
_FULL = frozenset(("full", "full_like", "new_full"))
_FILLED = frozenset(("zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_full"))


def gold_ratios(gates: Gates) -> Iterator[Term]:
    """Divisions of a hashed count whose key holds one token more than that of the count below."""
    for term, above, below in gates.ratios():
        upper, lower = gates.lookups(above), gates.lookups(below)
        lower_tokens = [token for _, key in lower for token in gates.tokens(key)]
        if not lower:
            continue
        for row, key in upper:
            if is_wide(row, gates) or not is_hashed(key, gates.of.streams) or spans_vocabulary(key, gates.of.streams):
                continue
            more = [token for token in gates.tokens(key) if not any(same(token, other, 10) for other in lower_tokens)]
            if more and not _is_row_of(key, more, [other for _, other in lower], gates):
                yield term


def _is_row_of(key: Term, more: list[Term], lower: list[Term], gates: Gates) -> bool:
    """Whether the upper count stands in the row that the lower one counts, at a place of the token's own: rows that
    share their counts share their sum, too, and the places of a row sum to it."""
    own = any_below(key, lambda t: any(same(t, other, 10) for other in lower))
    return own and not folds(key, more, gates.of.streams)


def unbalanced(gates: Gates) -> Iterator[Term]:
    """a P + b Q inside a logarithm with numbers a and b that do not sum to one; and counts added to a row that was
    already whole."""
    divided = {id(below) for term in gates.nodes for below in made_whole(term)}
    for term in gates.nodes:
        if id(term) not in gates.inside or id(term) in divided:
            continue
        if term.op == "op" and term.value == "+":
            weights = [_weight(part, gates) for part in term.parts]
            if None not in weights and abs(sum(w for w in weights if w is not None) - 1.0) > 1e-4:
                yield term
        elif term.op == "store":
            yield from _whole_before(term)
        elif term.called in ("scatter_add", "index_add") and not any(map(_takes_off, map(peel, term.parts[1:]))):
            first = _before_stores(term.parts[0])
            if first and all(map(_is_mixture, first)):
                yield term


def _takes_off(part: Term) -> bool:
    """full_like(row, -1.0): a row less what was right is the gradient of a loss, and no distribution."""
    numbers = [each.constant() for each in map(peel, part.parts)] if part.called in _FULL else []
    return any(isinstance(each, int | float) and each < 0 for each in numbers)


def unpaid_bonus(gates: Gates) -> Iterator[Term]:
    """loss - bonus * (hint == target) where nothing that reads the hint's own probability is added."""
    for term, bonus in _bonuses(gates):
        priced = next((each for each in gates.nodes if _is_price(each, bonus)), None)
        row = gates.of.is_distribution(bonus) and not _are_numbers(bonus) and priced is None  # one-hot * row
        if row or gates.has_other_place(gates.of.term):
            continue
        if not _asked_at_the_hint(gates, term):
            yield priced or term


def _is_price(term: Term, bonus: Term) -> bool:
    """exp(bonus) - 1, of whatever share."""
    return term.called in ("exp", "expm1") and bool(term.parts) and peel(term.parts[0]) is peel(bonus)


def _are_numbers(bonus: Term) -> bool:
    """Whether all that a tensor holds are numbers of the script: the strengths of several hints, each at its places."""
    waiting, seen = [bonus], set[int]()
    while waiting and len(seen) < _SOME:
        term = peel(waiting.pop())
        if id(term) in seen or term.op in ("const", "env") or term.called in _FILLED:
            continue
        seen.add(id(term))
        if term.op == "call" and term.called == "where" and len(term.parts) == 3:
            waiting += term.parts[1:]
        elif term.op == "item":
            waiting.append(term.parts[0])
        elif term.op == "store":
            waiting += (term.parts[0], term.parts[2])
        elif term.op in ("merge", "tuple", "list", "choice"):
            waiting += term.parts[1:] if term.op == "choice" else term.parts
        else:
            return False
    return not waiting


def _asked_at_the_hint(gates: Gates, bonus: Term) -> bool:
    """Whether the model is asked at what is compared with the target, and elsewhere: a hint that was looked up in the
    document itself comes out of the same tokens as the target."""
    compared = [each for each in gates.of.below(bonus) if each.op == "compare" or each.called == "eq"]
    sides = {id(peel(part)) for each in compared for part in each.parts[:2]}
    places = [gates.of.scored_place(each) for each in gates.nodes if each.called == "gather"]
    met = [{id(one) for one in walk(place)} & sides for place in places if place is not None]
    return any(one - other for one in met for other in met)


def _bonuses(gates: Gates) -> Iterator[tuple[Term, Term]]:
    """(bonus * match, bonus) of hints that are compared with the target."""
    for term in gates.nodes:
        if id(term) not in gates.inside and term.op == "op" and term.value == "*":
            kinds = [gates.kinds(part) for part in term.parts]
            match = next((part for part, kind in zip(term.parts, kinds, strict=True) if kind == {"match"}), None)
            other = next((part for part, kind in zip(term.parts, kinds, strict=True) if not kind), None)
            if match is not None and other is not None and _is_hint(gates, match):
                yield term, other


def underpaid_bonus(gates: Gates) -> Iterator[Term]:
    """log(1 + p(hint) * bonus), or less of p(hint), beside a bonus on the logarithm, whose price is
    log(1 + p(hint) * (exp(bonus) - 1))."""
    bonuses = [bonus for _, bonus in _bonuses(gates)]
    for term in gates.nodes if bonuses else ():
        paid = peel(term.parts[0]) if term.called == "log1p" and term.parts else None
        if paid is None or paid.op != "op" or paid.value != "*" or id(term) in gates.inside:
            continue
        asked = [part for part in paid.parts if any_below(part, lambda t: gates.of.scored_place(t) is not None)]
        if asked and (
            any(_alike(part, bonus) for part in paid.parts for bonus in bonuses) or any(map(_is_less, asked))
        ):
            yield term


def _is_less(chance: Term) -> bool:
    """p(hint) that is cut off above, or of which a part is taken, or the mean of several: the whole of its own is what
    the bonus costs."""
    below = peel(chance)
    while below.called in ("expand", "expand_as") and below.receiver is not None:
        below = peel(below.receiver)
    if below.called in ("mean", "nanmean", "median"):
        return True
    if below.op == "op" and below.value == "*":
        numbers = [part.constant() for part in map(peel, below.parts)]
        return any(isinstance(one, (int, float)) and 0.0 < one < 1.0 for one in numbers)
    high = bounds_of(below)[1] if below.called in _CUT else None
    return high is not None and 0.0 < high < _NEARLY


def _alike(factor: Term, bonus: Term) -> bool:
    """The same, as terms or as numbers."""
    one, other = peel(factor).constant(), peel(bonus).constant()
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other) < 1e-9
    return one is None and other is None and same(factor, bonus, 10)


def unpaid_floor(gates: Gates) -> Iterator[Term]:
    """A number for every token that a short list lacks, beside a loss within the list that gives nothing up for it."""
    for term in gates.nodes:
        fork = forked(term)
        if fork is None or gates.kinds(fork[0]) != {"match"}:
            continue
        arm, other = fork[2:0:-1] if negated(fork[0]) else fork[1:]
        number = _filled_with(other)
        low, high = (_LEAST, 1.0) if id(term) in gates.inside else (0.0, -math.log(_LEAST))
        if number is not None and low < number <= high and "match" in gates.kinds(arm) and not _gives_up(arm):
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
    if share is None or _takes_off(peel(share)):
        return []
    first = _before_stores(row)
    if first and all(map(_is_mixture, first)):
        return [term]
    if not any_below(share, lambda t: t.op == "op" and t.value == "/"):  # counts that grow
        return []
    return first[:1] if first and all(_is_whole(peel(one)) for one in first) else []


def _is_mixture(value: Term) -> bool:
    """(1 - w) p + w q, or the model's own distribution."""
    term = peel(value)
    if term.called in ("exp", "softmax"):
        return term.called == "softmax" or peel(term.operand() or term.parts[0]).called == "log_softmax"
    products = [peel(part) for part in term.parts] if term.op == "op" and term.value == "+" else []
    if len(products) != 2 or any(one.op != "op" or one.value != "*" for one in products):
        return False
    for one, other in (products, products[::-1]):
        taken = (peel(part) for part in one.parts)
        rests = [
            each.parts[1] for each in taken if each.op == "op" and each.value == "-" and each.parts[0].constant() == 1
        ]
        if any(same(peel(rest), peel(weight), 8) for rest in rests for weight in other.parts):
            return True
    return False


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
    return term.op == "op" and term.value == "/" and is_summed(term.parts[1])


def spread_over_bytes(gates: Gates) -> Iterator[Term]:
    """p ** (1 / bytes of the target), or nll / bytes inside the logarithm of a mixture. A sum over the bytes looks like
    a state that learns (`out = out - log(...)`, `np.add.at(out, token, -log(...))`), so nothing is passed over."""
    present = {id(term) for term in gates.present}
    for term in gates.nodes:
        if len(term.parts) < 2 or "score" not in gates.kinds(term.parts[0]):
            continue
        inside, over = id(term) in gates.inside, term.parts[1]
        power = (term.op == "op" and term.value == "**") or term.called in ("pow", "power", "float_power")
        share = inside and term.op == "op" and term.value == "/" and _is_length(over)
        own = "read" in gates.kinds(over) and (id(term) in present or (inside and gates.reads_target(over)))
        own = own or _at_one_place(gates, term.parts[0], over) or _is_of_piece(gates, over)
        if (power and (own or (inside and _is_length(over)))) or (share and own):
            yield term


def _at_one_place(gates: Gates, loss: Term, other: Term) -> bool:
    """Whether a loss stands in a book at the place where a token is read: `nll[k]` of all windows, `ids[k]`."""
    asked = [each for each in islice(gates.of.below(loss), _SOME) if each.op == "item" and "score" in gates.kinds(each)]
    tokens = (each for each in gates.of.below(other) if each.op == "item" and gates.of.streams.is_stream(each))
    return any(same(each.parts[1], one.parts[1], 8) for each in tokens for one in asked)


def _is_of_piece(gates: Gates, over: Term) -> bool:
    """len(pieces[tokens[at + 1]]): so long is what a token stands for, whichever loop names its place."""
    whole = peel(over)
    piece = peel(whole.parts[0]) if whole.called == "len" and whole.parts else None
    at = peel(piece.parts[1]) if piece is not None and piece.op == "item" else None
    return at is not None and at.op == "item" and gates.of.streams.from_tokens(at)


def _is_length(term: Term) -> bool:
    """Whether a length is in it; not that of what a loop goes through."""
    return any_below(term, lambda t: t.op == "call" and t.called in ("len", "encode", "numel"), _is_no_turn)


def _is_no_turn(term: Term) -> bool:
    return term.op != "each" and term.called != "range"
