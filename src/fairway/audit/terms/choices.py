"""Choices and products: what a condition, a mask or a minimum chooses between, and what only looks like a choice."""

from collections.abc import Iterator

from fairway.audit.terms.term import Term, alternatives, peel, same

_PRODUCTS = frozenset(("mul", "multiply", "dot", "matmul", "einsum", "lerp", "mm", "bmm", "average"))


_MASKS = frozenset("isin in1d eq ne lt le gt ge logical_and logical_or logical_not nonzero".split())  # noqa: SIM905


def forked(term: Term) -> tuple[Term, Term, Term] | None:
    """(condition, if true, if false) of a choice: if, where, select, values[mask] = others[mask]."""
    if term.op == "choice" and len(term.parts) == 3:
        return term.parts[0], term.parts[1], term.parts[2]
    if term.op == "call" and term.called in ("where", "select", "cond") and len(term.parts) >= 3:
        if term.receiver is not None:  # x.where(condition, other)
            return term.parts[1], term.parts[0], term.parts[2]
        return term.parts[0], term.parts[1], term.parts[2]
    if term.op == "store" and len(term.parts) == 3 and term.value is None and is_mask(term.parts[1]):
        given = peel(term.parts[2])
        picked = given.op == "item" and same(given.parts[1], term.parts[1], 6)
        return term.parts[1], given.parts[0] if picked else given, term.parts[0]
    return None


def is_mask(index: Term) -> bool:
    """A selection by truth values: it picks positions, and looks nothing up."""
    below = peel(index)
    if below.op == "compare":
        return True
    if below.op == "op" and below.value in ("&", "|", "and", "or"):
        return any(is_mask(part) for part in below.parts)
    if below.op == "op" and below.value in ("~", "not"):
        return True
    return below.op == "call" and below.called in _MASKS


def picks(index: Term) -> bool:
    """Positions by truth values, or the places of these: np.nonzero(best == n)[0][a : a + 1024]."""
    below = peel(index)
    while below.op == "item" and peel(below.parts[1]).op in ("const", "slice"):
        below = peel(below.parts[0])
    return is_mask(index) or below.called in ("nonzero", "flatnonzero", "argwhere")


def carried(term: Term, at: Term | None = None) -> bool:
    """Whether one of the options is what an earlier pass left: the best so far. That is a choice among passes."""
    possible = [term] if at is not None else [*alternatives(term)]
    line = (at or term).file, (at or term).line
    for option in possible:
        waiting, steps = [option], 0
        while waiting and steps < 60:
            one = peel(waiting.pop())
            steps += 1
            if at is not None and one is not at and (one.file, one.line) == line and one.called == at.called:
                return True
            if one.op in ("merge", "store", "mutate"):
                waiting.extend(one.parts)
            elif one.op in ("choice", "item"):
                waiting.extend(one.parts[1:] if one.op == "choice" else one.parts[:1])
    if at is None and term.op == "choice":
        return any(
            one.op == "choice" and one is not term and (one.file, one.line) == line
            for part in term.parts[1:]
            for one in _merged(part)
        )
    return False


def _merged(term: Term) -> Iterator[Term]:
    waiting, steps = [term], 0
    while waiting and steps < 60:
        one = peel(waiting.pop())
        steps += 1
        yield one
        if one.op == "merge":
            waiting.extend(one.parts)


def options(term: Term) -> list[Term]:
    """What a minimum or maximum is taken of: its arguments, but for the dimension of x.min(0) and torch.min(x, 0)."""
    along = term.receiver is not None or "." in str(term.value)
    return [
        part
        for part, key in zip(term.parts, term.keys, strict=True)
        if key not in ("dim", "axis", "key", "keepdim", "keepdims") and not (along and type(part.constant()) is int)
    ]


def chooses(operand: Term) -> bool:
    """min or max over a few experts: of a stack of named things, or of a row of probabilities read at the target; not
    over a list that a loop of passes has filled."""
    below = peel(operand)
    if below.op == "call" and below.called in ("stack", "cat", "vstack", "concatenate", "array"):
        listed = below.operand("tensors", "arrays")
        return listed is not None and listed.op in ("list", "tuple") and listed.value != "comp"
    if below.op in ("list", "tuple"):
        return below.value != "comp"
    return below.op == "item"


def is_product(term: Term) -> bool:
    if term.op == "op" and term.value in ("*", "@"):
        return True
    return term.op == "call" and term.called in _PRODUCTS


def is_nothing(term: Term) -> bool:
    """Nought, or nothing at all: a mask leaves out, it does not choose."""
    below = peel(term)
    if below.op == "const":
        return below.value in (None, 0, 0.0, False) or below.value == ""
    if below.op == "call" and below.called in ("zeros", "zeros_like", "new_zeros"):
        return True
    return below.op == "attr" and below.value == "new_zeros"
