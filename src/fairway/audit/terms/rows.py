"""Rows over the vocabulary: what they are divided by, and whether that is their sum."""

from collections.abc import Iterator

from fairway.audit.terms.choices import options
from fairway.audit.terms.gates import Gates
from fairway.audit.terms.keys import is_hashed, spans_vocabulary
from fairway.audit.terms.term import Term, alternatives, any_below, layers, peel, same

_DEEP = 2  # tables by order, of documents
_PUT = 2  # parts of a store before what is put there


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
        if rows and not sums_of(below, rows):
            lower = gates.lookups(below)
            if lower and all(same(own, other, 10) for _, own in rows for _, other in lower):
                continue  # how often what was said there came true, of how often it was said: a rate, no row
            if lower and not any(spans_vocabulary(key, gates.of.streams) and is_summed(below) for _, key in lower):
                yield term


def counted_otherwise(gates: Gates) -> Iterator[Term]:
    """A whole row of counts, divided by a count whose key is another than the row's: contexts that meet in the row are
    counted apart below, or the other way round."""
    for term, above, below in gates.ratios():
        rows = [(row, key) for row, key in gates.lookups(above) if is_wide(row, gates)]
        lower = gates.lookups(below)
        if not rows or not lower or sums_of(below, rows):
            continue
        keys = [key for _, key in (*rows, *lower)]
        apart = not any(same(own, other, 10) for _, own in rows for _, other in lower)
        if (
            apart
            and any(is_hashed(key, gates.of.streams) for key in keys)
            and not any(gates.kinds(key) for key in keys)
        ):
            yield term


def is_wide(row: Term, gates: Gates) -> bool:
    """table[context] of a table that is filled at [context, token], or at [context * size + token] of its flat form;
    also where tables are kept by order or by document: tables[n][context] of what is filled at [n][context, token]."""
    if row.op != "item" or row.parts[1].op == "slice":
        return False
    whole, many = row, 0
    while whole.op == "item":
        many += len(_indices(whole.parts[1]))
        whole = peel(whole.parts[0])
    return any(
        len(place) == many + 1 and all(map(gates.of.streams.from_tokens, place[-2:])) for place in _filled(whole, _DEEP)
    )


def _indices(place: Term) -> tuple[Term, ...]:
    return place.parts if place.op == "tuple" else (place,)


def _filled(whole: Term, deep: int) -> Iterator[tuple[Term, ...]]:
    """The places that something is put into, with those within them: (n, context, token)."""
    for one in layers(whole):
        if one.op not in ("store", "mutate") or len(one.parts) < _PUT:
            continue
        own = _context_and_token(one.parts[0], one.parts[1]) or (one.parts[1],)
        yield own
        if deep and one.op == "store" and len(one.parts) > _PUT:
            yield from ((*own, *place) for place in _filled(one.parts[_PUT], deep - 1))


def _context_and_token(table: Term, place: Term) -> tuple[Term, ...]:
    """(context, token) of a place; () of another one."""
    if place.op == "tuple":
        return place.parts
    base = next((one for one in layers(table) if one.called in ("view", "flatten", "reshape", "ravel")), None)
    summed = peel(place)
    if base is None or summed.op != "op" or summed.value != "+":
        return ()
    scaled = [part for part in summed.parts if peel(part).op == "op" and peel(part).value == "*"]
    return summed.parts if len(scaled) == 1 else ()


def sums_of(below: Term, rows: list[tuple[Term, Term]]) -> bool:
    """Whether a sum over the counts of one of these rows is a part of a term."""
    return any_below(below, lambda term: _sums(term, rows))


def _sums(term: Term, rows: list[tuple[Term, Term]]) -> bool:
    """A sum over the same counts."""
    if term.op != "call" or term.called not in ("sum", "nansum", "norm", "fsum", "softmax"):
        return False
    return any(any_below(term, lambda t, row=row: _is_of(row, t)) for row, _ in rows)  # type: ignore[misc]


def _is_of(row: Term, term: Term) -> bool:
    """Whether this is the row, or the whole of which it is a place: counts[context] for counts[context, token]."""
    if term is row or same(term, row, 8):
        return True
    if term.op != "item" or row.op != "item" or row.parts[1].op != "tuple":
        return False
    context = row.parts[1].parts[:-1]
    own = term.parts[1].parts if term.parts[1].op == "tuple" else (term.parts[1],)
    alike = len(own) == len(context) and all(same(a, b, 8) for a, b in zip(own, context, strict=True))
    return alike and same(peel(term.parts[0]), peel(row.parts[0]), 6)


def is_summed(term: Term) -> bool:
    return any_below(term, lambda t: t.op == "call" and t.called in ("sum", "nansum", "fsum"))


def made_whole(term: Term) -> Iterator[Term]:
    """What is added up in a row that is divided by its own sum: row / row.sum(), also where the row is a place in a
    table that was stored before."""
    if term.op != "op" or term.value != "/" or not is_summed(term.parts[1]):
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


def normalised(gates: Gates) -> set[int]:
    """The ids of what is divided by its own sum further up, or goes into a softmax."""
    whole = {id(below) for term in gates.nodes for below in made_whole(term)}
    for term in gates.nodes:
        softened = term.parts if term.called in _SOFTENING else (term.operand("input", "a"),) if _is_loss(term) else ()
        whole.update(id(below) for below in gates.of.below(*(part for part in softened if part is not None)))
    return whole


def _is_loss(term: Term) -> bool:
    """cross_entropy(logits, targets) makes a softmax of its logits."""
    return term.op == "call" and term.called == "cross_entropy"


def undivided(gates: Gates) -> Iterator[Term]:
    """A row of a memory that is mixed in divided by its largest entry, its length and the like instead of its sum."""
    whole = normalised(gates)
    for term in gates.nodes:
        if id(term) in gates.inside and id(term) not in whole and term.op == "op" and term.value == "+":
            for row, under, where in (found for part in term.parts for found in _divided(part)):
                if id(row) not in whole and _is_another_size(gates, row, under):
                    yield where


def greatest(gates: Gates) -> Iterator[Term]:
    """The larger of several distributions token by token, which nothing divides by its sum afterwards."""
    whole = normalised(gates)
    for term in gates.present:
        if id(term) not in gates.inside or id(term) in whole or term.called not in ("maximum", "fmax", "max", "amax"):
            continue
        among = options(term)
        if len(among) == 1:
            stacked = peel(among[0])
            listed = stacked.operand("tensors", "arrays") if stacked.called in ("stack", "cat") else None
            among = list(listed.parts) if listed is not None and listed.op in ("list", "tuple") else []
        soft = [
            part for part in among if any(t.called in ("softmax", "log_softmax") for t in gates.without_learning(part))
        ]
        if len(soft) >= 2 and not any(gates.kinds(part) for part in among):
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


def added_on_top(gates: Gates) -> Iterator[Term]:
    """p + w q inside a logarithm, of a distribution p that is whole already and gives nothing up, which nothing divides
    afterwards: not p + w (q - p), not (p + w q) / (1 + w)."""
    for term in gates.nodes:
        if id(term) not in gates.inside or term.op != "op" or term.value != "+":
            continue
        for whole, more in (term.parts, term.parts[::-1]):
            weight = _weighed(more, whole, gates) if _is_whole_softmax(whole) else None
            if weight is not None and not _made_up_for(term, weight, gates):
                yield term


def _is_whole_softmax(term: Term) -> bool:
    """A softmax, or the exponential of a log softmax, whole or read at a token, and nothing else."""
    below = _as_row(term)
    if below.called in ("exp", "exp_") and below.parts:
        return _as_row(below.operand() or below.parts[0]).called == "log_softmax"
    return below.called == "softmax"


def _as_row(term: Term) -> Term:
    """The row that a value at a place is read from: beneath gather, [...], and guards against nought."""
    below = peel(term)
    while below.op == "item" or below.called in ("gather", "take_along_dim", "clamp", "clamp_min"):
        below = peel(below.parts[0])
    return below


def _weighed(more: Term, whole: Term, gates: Gates) -> Term | None:
    """The weight of w q, where q is a row of ratios and has nothing of the other distribution in it."""
    below = _as_row(more)
    if below.op != "op" or below.value != "*":
        return None
    for weight, row in (below.parts, below.parts[::-1]):
        ratio = peel(row)
        divided = ratio.op == "op" and ratio.value == "/" and gates.of.is_distribution(ratio)
        if divided and not any_below(more, lambda t: t is peel(whole)):
            return weight
    return None


def _made_up_for(term: Term, weight: Term, gates: Gates) -> bool:
    """Whether the sum is scaled, divided, or has something taken off again that knows the weight or the sum itself."""
    for node in gates.nodes:
        if node is term or node.op not in ("op", "call"):
            continue
        if node.called in _SUMS and any_below(node, lambda t: t is term):
            return True
        if node.called in ("log", "log1p", "log_"):
            if any_below(node, lambda t: t is weight) and not any_below(node, lambda t: t is term):
                return True
        elif node.op == "op" and node.value in ("/", "*", "-") and any(peel(part) is term for part in node.parts):
            return True
    return False


_SUMS = frozenset(("sum", "nansum", "logsumexp", "softmax", "log_softmax", "normalize", "norm"))
