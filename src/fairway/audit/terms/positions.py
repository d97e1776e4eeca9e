"""Where in a stream of token ids something begins: tokens[a + 1 : b] at a + 1, tokens[t] of a loop from a to b at a.

Two of them that begin at the same place of the same stream run beside one another, whichever way each is written.
"""

from dataclasses import dataclass, field

from fairway.audit.terms.term import Term, peel, same


@dataclass
class Place:
    """base: the stream; number + the sum of factor * term over `terms`: where in it."""

    base: Term
    number: int = 0
    terms: list[tuple[Term, int]] = field(default_factory=list)

    def add(self, term: Term, factor: int, depth: int = 12) -> bool:
        """Adds factor * term; False where the term is no whole position."""
        term = peel(term)
        if term.op == "const":
            if type(term.value) is not int:
                return False
            self.number += factor * term.value
            return True
        if term.op == "op" and term.value in ("+", "-") and depth:
            other = factor if term.value == "+" else -factor
            return self.add(term.parts[0], factor, depth - 1) and self.add(term.parts[1], other, depth - 1)
        counted = first_of(term)
        if counted is not None and depth:
            return self.add(counted, factor, depth - 1)
        for at, (known, count) in enumerate(self.terms):
            if same(known, term, 8):
                self.terms[at] = (known, count + factor)
                return True
        self.terms.append((term, factor))
        return True

    def meets(self, other: "Place") -> bool:
        """Whether both are the same place of the same stream."""
        if self.number != other.number or not same(self.base, other.base, 8):
            return False
        left = Place(self.base, 0, list(self.terms))
        return all(left.add(term, -factor) for term, factor in other.terms) and not any(n for _, n in left.terms)


_ZERO = Term("const", (), 0)


def first_of(term: Term) -> Term | None:
    """The first number of a range that a loop runs over, or of arange; None for anything else."""
    while term.op == "round":
        term = term.parts[0]
    if term.op == "each":
        term = term.parts[0]
    elif term.called != "arange":
        return None
    if term.op != "call" or term.called not in ("range", "arange"):
        return None
    numbers = [part for part, key in zip(term.parts, term.keys, strict=True) if isinstance(key, int)]
    step = numbers[2] if len(numbers) > 2 else term.argument("step")
    if step is not None and step.constant() != 1:
        return None
    return _ZERO if len(numbers) == 1 else numbers[0] if numbers else None


def place_of_tokens(term: Term) -> Place | None:
    """Where a cut out of a stream begins; None where it is no plain cut."""
    cuts: list[Term] = []
    term = peel(term)
    while term.op == "item" and len(cuts) < 12:
        row = _of_row(term)
        if row is not None:
            cuts.append(row[1])
            term = row[0]
            break
        index = _cut(term.parts[1])
        if index is None:
            return None
        cuts.append(index)
        term = peel(term.parts[0])
    if not cuts:
        return None
    place = Place(term)
    return place if all(place.add(cut, 1) for cut in cuts) else None


def _of_row(term: Term) -> tuple[Term, Term] | None:
    """Of rows[i, a:b] the row, and where in it that begins; None for anything else."""
    index = term.parts[1]
    if index.op != "tuple" or len(index.parts) != 2 or index.parts[1].op != "slice" or index.parts[0].op == "slice":
        return None
    low = _cut(index.parts[1])
    return None if low is None else (Term("item", (term.parts[0], index.parts[0]), None, term.file, term.line), low)


def _cut(index: Term) -> Term | None:
    """The first position that an index takes."""
    if index.op == "tuple":  # ids[a:, None]: the shape alone
        kept = [part for part in index.parts if not (part.op == "const" and part.value in (None, ...))]
        return _cut(kept[0]) if len(kept) == 1 else None
    if index.op == "slice":
        low = index.parts[0] if index.parts else _ZERO
        if low.op == "const" and low.value is None:
            return _ZERO
        negative = low.op == "const" and isinstance(low.value, int) and low.value < 0
        return None if negative else low
    if index.op == "const":
        return None  # one token of a stream, or one row of a batch
    return index


def runs(term: Term) -> bool:
    """Whether a token is taken by a running number: tokens[t], tokens[arange(a, b)]."""
    term = peel(term)
    return term.op == "item" and term.parts[1].op != "slice" and _running(term.parts[1])


def _running(index: Term, depth: int = 6) -> bool:
    index = peel(index)
    if first_of(index) is not None:
        return True
    plain = index.op == "op" and index.value in ("+", "-") and depth
    return bool(plain) and any(_running(part, depth - 1) for part in index.parts)
