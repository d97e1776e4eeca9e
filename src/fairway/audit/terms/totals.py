"""Totals: what a sum is made of, and which values are states that learn and not sums."""

from collections.abc import Callable, Iterable, Iterator

from fairway.audit.terms.term import Term, any_below, peel, same

LOSSES = frozenset(("cross_entropy", "nll_loss", "softmax_cross_entropy_with_integer_labels"))
GATHERS = frozenset(("gather", "take_along_axis", "take_along_dim", "index_select", "index_sample"))


def summed(term: Term) -> tuple[Term, ...] | None:
    """What a sum is made of; None for a term that is no sum."""
    below = peel(term)
    if below is not term:
        return (below,)
    if term.op == "op" and term.value == "+" and any(is_running(part) or _is_total(part) for part in term.parts):
        return (term.parts[1], term.parts[0])
    if term.op == "op" and term.value == "-" and is_running(term.parts[0]):
        return (term.parts[1], term.parts[0])
    if term.op == "op" and term.value in ("/", "*") and not _is_formula(term):
        return term.parts
    if term.op == "op" and term.value == "neg":
        return term.parts
    if term.op == "merge":
        return term.parts[::-1]
    if term.op == "choice" and (is_running(term.parts[1]) or is_running(term.parts[2])):
        return term.parts[1:]
    if term.op == "mutate" and term.value in (".add_", ".append", ".extend", ".sub_", ".insert"):
        return term.parts[::-1]
    if term.op == "call" and term.called in (
        "sum",
        "mean",
        "fsum",
        "nansum",
        "all_reduce",
        "cat",
        "stack",
        "concatenate",
    ):
        operand = term.operand("tensors", "a")
        return (operand,) if operand is not None else ()
    if term.op in ("list", "tuple"):
        return term.parts
    if term.op == "item" and _is_filled(term.parts[0]):
        return (term.parts[0],)
    if term.op == "store":
        added = added_to_row(term)
        if added is None and _is_filled(term):
            added = term.parts[2]
        return (added, term.parts[0]) if added is not None else None
    if term.op == "each" and term.parts[0].op in ("merge", "choice", "mutate", "list", "store"):
        return term.parts
    return None


_EMPTY = ("empty", "new_empty", "empty_like")


def _is_filled(term: Term) -> bool:
    """losses = torch.empty(n), and losses[a:b] = ... part by part: what it holds is what was stored."""
    waiting, seen, stores = [term], set[int](), 0
    while waiting:
        below = peel(waiting.pop())
        if id(below) in seen:
            continue
        seen.add(id(below))
        if below.op == "store":
            stores += 1
            waiting.append(below.parts[0])
        elif below.op == "merge":
            waiting.extend(below.parts)
        elif below.op != "call" or below.called not in _EMPTY:
            return False
    return stores > 0


def added_to_row(term: Term) -> Term | None:
    """What `sums[chunk, 3] += x` or `sums.index_add_(0, documents, x.sum(1))` adds, with the table after it given; None
    of another store."""
    value = peel(term.parts[2]) if term.op == "store" else term
    if value is term or value.op != "op" or value.value != "+":
        return None
    if term.parts[1].op != "tuple" and peel(value.parts[1]).called not in ("sum", "nansum"):
        return None  # counts of tokens or contexts
    before = peel(value.parts[0])
    return value.parts[1] if before.op == "item" and same(before.parts[1], term.parts[1], 8) else None


def _is_total(term: Term) -> bool:
    """A sum or a mean, or several of them: not one token's loss, of which nll + log_z is made."""
    below = peel(term)
    if below.op == "op" and below.value in ("+", "-", "*", "/") and below.parts:
        return any(_is_total(part) for part in below.parts)
    return below.called in ("sum", "mean", "fsum", "nansum", "all_reduce", "dot") or below.op == "each"


def is_running(term: Term) -> bool:
    """A total: nought, or what earlier rounds left."""
    waiting, steps = [term], 0
    while waiting and steps < 40:
        one = peel(waiting.pop())
        steps += 1
        if one.op == "const" and one.value == 0 and type(one.value) in (int, float):
            return True
        if one.op == "call" and one.called in ("zeros", "zeros_like", "new_zeros"):
            return True
        if one.op in ("merge", "choice"):
            waiting.extend(one.parts[1:] if one.op == "choice" else one.parts)
        elif one.op in ("op", "mutate") and one.parts:
            waiting.append(one.parts[0])
    return False


def is_update(term: Term) -> bool:
    """decay * state + what is learned: the next value of something that began as nought and is carried along."""
    if term.op != "op" or term.value not in ("+", "-"):
        return False
    left = peel(term.parts[0])
    while left.op in ("item", "store"):  # counts[row] + ..., in a table of noughts that rows were added to
        left = peel(left.parts[0])
    scaled = left.op == "op" and left.value == "*" and any(part.op == "const" for part in left.parts)
    return is_running(left.parts[1] if scaled and left.parts[0].op == "const" else left.parts[0] if scaled else left)


def is_learned(term: Term) -> bool:
    """An update of what is kept: a tensor, a moving average, a place in a table that is stored again; no number that a
    loop only adds to, and no sum with a place of a table, which is only read."""
    if term.op == "store":
        return is_update(term.parts[2])
    return is_update(term) and not _is_number(term.parts[0]) and peel(term.parts[0]).op != "item"


def unlearned(root: Term, parts: Callable[[Term], Iterable[Term]] = lambda term: term.parts) -> Iterator[Term]:
    """All that a value is made of, each once, without what a state of it has learned. parts: what a term reads."""
    waiting, seen = [root], set[int]()
    while waiting and len(seen) < 20_000:
        term = waiting.pop()
        if id(term) in seen or (is_learned(term) and term.op != "store" and term is not root):
            continue
        seen.add(id(term))
        yield term
        waiting.extend(term.parts[:2] if is_learned(term) and term.op == "store" else parts(term))


def _is_number(total: Term) -> bool:
    """Whether a running total began as the number nought."""
    waiting, steps = [total], 0
    while waiting and steps < 40:
        one = peel(waiting.pop())
        steps += 1
        if one.op == "const":
            return True
        if one.op in ("merge", "choice"):
            waiting.extend(one.parts[1:] if one.op == "choice" else one.parts)
        elif one.op == "op" and one.value in ("+", "-") and one.parts:
            waiting.append(one.parts[0])
    return False


def _is_formula(term: Term) -> bool:
    """A product of per-token values, not a scaling by counts and constants."""
    return all(any_below(part, lambda t: t.op == "call" and t.called in LOSSES | GATHERS) for part in term.parts)
