"""How often the byte of a leading space is counted for one token."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from fairway.audit.terms.octets import MARK, encoded_text, has_mark, is_byte_test, is_mark, looked_up, named, negated
from fairway.audit.terms.term import Term, any_below, peel
from fairway.audit.terms.totals import added_to_row

Origin: TypeAlias = tuple[str, int, str, str, int]
"""File, line, kind and value of a term, and the table that it was looked up in."""

_BOTH = frozenset(("&", "and", "logical_and", "bitwise_and", "*"))
_SUMS = frozenset(
    """sum nansum fsum all_reduce reduce cumsum count_nonzero int float bool mean masked_select logical_and
    clamp clamp_min clip maximum max abs einsum dot matmul mul multiply cat stack concatenate sorted""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Spaces:
    """How often one token's count adds the byte of a leading space: once for each term that adds it, told apart by
    where it stands and by the table that it is looked up in; less those that take it off again."""

    added: dict[Origin, Term]
    taken: dict[Origin, Term]

    @property
    def count(self) -> int:
        return len(self.added) - len(self.taken)

    def __or__(self, other: "Spaces") -> "Spaces":
        if not (other.added or other.taken):
            return self
        return Spaces({**self.added, **other.added}, {**self.taken, **other.taken})

    def added_at(self, at: Term) -> "Spaces":
        """Of flags, which count nothing by themselves: what counts is where they are added."""
        flags = (origin for origin, term in self.added.items() if term.op == "const" and term.value is True)
        return Spaces({**self.added, **dict.fromkeys(flags, at)}, self.taken)


NONE = Spaces({}, {})


class SpaceCount:
    """Counts the spaces of a term, each term once."""

    def __init__(self) -> None:
        self.done: dict[tuple[int, bool, int], tuple[Term, Spaces]] = {}
        self.marks: dict[int, tuple[Term, bool]] = {}

    def has_mark(self, term: Term) -> bool:
        if id(term) not in self.marks:
            self.marks[id(term)] = (term, has_mark(term))
        return self.marks[id(term)][1]

    def of(self, term: Term, marked: bool = False, table: int = 0, depth: int = 200) -> Spaces:
        """marked: a condition that holds here says that the piece has the mark; table: the innermost table that
        was looked into."""
        key = (id(term), marked, table)
        if key not in self.done:
            self.done[key] = (term, NONE)  # a circle adds nothing
            self.done[key] = (term, self._of(term, marked, table, depth - 1) if depth else NONE)
        return self.done[key][1]

    def _one(self, term: Term, table: int) -> Spaces:
        if (
            term.op == "op" and peel(term.parts[0]).op == "item"
        ):  # flags[token] & ~starts[before]: of a token, not of a table
            table = 0
        return Spaces({(term.file, term.line, term.op, str(term.value), table): term}, {})

    def _most(self, terms: Iterable[Term], marked: bool, table: int, depth: int) -> Spaces:
        return max((self.of(term, marked, table, depth) for term in terms), key=lambda one: one.count, default=NONE)

    def _of(self, term: Term, marked: bool, table: int, depth: int) -> Spaces:
        below = peel(term)
        if below is not term:
            return self.of(below, marked, table, depth)
        if term.op == "const":
            counts = marked and (term.value is True or (type(term.value) in (int, float) and term.value == 1))
            return self._one(term, table) if counts else NONE
        if term.op in ("op", "mutate") and len(term.parts) > 1:
            return self._operation(term, str(term.value), term.parts, marked, table, depth)
        if term.op == "choice":
            said = self.has_mark(term.parts[0]) and not any_below(term.parts[0], is_byte_test)
            yes, no = said and not negated(term.parts[0]), said and negated(term.parts[0])
            arms = (
                self.of(term.parts[1], marked or yes, table, depth),
                self.of(term.parts[2], marked or no, table, depth),
            )
            return max(arms, key=lambda one: one.count)
        if term.op in ("merge", "list", "tuple", "round", "each"):
            return self._most(term.parts[:64], marked, table, depth)
        if term.op == "store":
            return self._most((term.parts[0], term.parts[2]), marked, table, depth)
        column = looked_up(term)
        if column is not None:
            # Counts of tokens, of which a mask picks some, and sums of them by row are no table.
            summed = peel(column).op == "op" or _is_ledger(column)
            return self.of(column, marked, table if summed else _made_at(column), depth)
        if term.op == "compare":
            return self._one(term, table) if self.has_mark(term) else NONE
        return self._call(term, marked, table, depth) if term.op == "call" else NONE

    def _operation(
        self, term: Term, sign: str, parts: tuple[Term, ...], marked: bool, table: int, depth: int
    ) -> Spaces:
        if sign in ("+", ".add_", "add", "plus"):
            one, other = (self.of(part, marked, table, depth).added_at(term) for part in parts[:2])
            return one | other
        if sign in ("-", ".sub_", "sub", "subtract"):
            kept = self._kept_of_mark(parts[0], parts[1])
            if kept is not None:
                return self._one(term, table) if kept == 1 else NONE
            first, second = (self.of(part, marked, table, depth) for part in parts[:2])
            return Spaces(first.added, {**first.taken, **second.added})
        if sign in ("&", "and", "|", "or", "logical_and", "bitwise_and", "^"):
            return self._one(term, table) if self.has_mark(term) else NONE
        if sign in ("~", "not", "//", "%", "<<", ">>"):
            return NONE
        return self._most(parts, marked, table, depth)

    def _kept_of_mark(self, length: Term, taken: Term) -> int | None:
        """How many of the mark's three bytes len(piece) - 2 * piece.startswith(mark) leaves; None for anything else."""
        text = encoded_text(peel(length))
        if text is None or any_below(text, is_mark) or not named(text):
            return None
        factors = _factors_of(taken)
        numbers = [factor.value for factor in factors if factor.op == "const" and type(factor.value) is int]
        tests = [factor for factor in factors if factor.op != "const"]
        if len(tests) != 1 or not self.has_mark(tests[0]) or len(numbers) > 1:
            return None
        return len(MARK.encode()) - (numbers[0] if numbers else 1)

    def _kept_space(self, term: Term, seen: set[int]) -> Term | None:
        """Where a text that is measured was given a space in the mark's place, unless it was cut off again: by [1:], by
        a strip, or by either of them for the pieces that begin with it."""
        below = peel(term)
        if id(below) in seen or self._cuts(below):
            return None
        seen.add(id(below))
        if _puts_space(below):
            return below
        if _keeps_space(below):
            return below if below.receiver is None or not self._cut_before(below.receiver) else None
        parts = below.parts
        if below.op == "choice" and self.has_mark(parts[0]):
            parts = (parts[2],) if negated(parts[0]) else (parts[1],)
        found = (self._kept_space(part, seen) for part in parts)
        return next((one for one in found if one is not None), None)

    def _cut_before(self, text: Term) -> bool:
        """Whether the leading mark is gone already: what is replaced then are marks within the piece."""
        below = peel(text)
        if below.op == "choice" and self.has_mark(below.parts[0]):
            below = peel(below.parts[2] if negated(below.parts[0]) else below.parts[1])
        return self._cuts(below)

    def _cuts(self, text: Term) -> bool:
        """Whether the first letter is cut off, whatever it is or where it is the mark: text[int(begins_with_it) :]."""
        low = text.parts[1].parts[0] if text.op == "item" and text.parts[1].op == "slice" else None
        return _cuts_space(text) or (low is not None and self.has_mark(low))

    def _call(self, term: Term, marked: bool, table: int, depth: int) -> Spaces:
        word = term.called
        if encoded_text(term) is not None:
            kept = self._kept_space(term, set())
            return NONE if kept is None else self._one(kept, table)
        if word == "startswith":
            return self._one(term, table) if self.has_mark(term) else NONE
        if word == "where" and len(term.parts) == 3:
            return self._of(Term("choice", term.parts, None, term.file, term.line), marked, table, depth)
        if word in ("add", "sub", "subtract", "logical_and", "bitwise_and") and len(term.parts) == 2:
            return self._operation(term, word, term.parts, marked, table, depth)
        if word in _SUMS:
            return self._most(term.parts, marked, table, depth)
        return NONE


def _made_at(table: Term) -> int:
    """Tells tables apart by where they are made: the same one may come to a score in several ways."""
    below = peel(table)
    return hash((below.file, below.line, below.op, str(below.value)))


def _is_ledger(table: Term) -> bool:
    """Rows of sums, `sums[chunk, 3] += nbytes`: what is read of them is what was added before."""
    below = peel(table)
    for _ in range(8):
        if below.op in ("merge", "choice"):
            below = peel(below.parts[-1])
    return added_to_row(below) is not None


def is_conditional(term: Term) -> bool:
    """Whether a space is added only where something else holds too, as a rule that no boundary stands before it; of
    two that are added, the one that always is gives the other's condition away."""
    return term.op == "op" and str(term.value) in _BOTH


def _factors_of(term: Term) -> list[Term]:
    term = peel(term)
    if term.op == "op" and term.value == "*":
        return [factor for part in term.parts for factor in _factors_of(part)]
    return [term]


def _cuts_space(term: Term) -> bool:
    """text[1:], or text.strip() and its kin."""
    if term.op == "item":
        cut = term.parts[1]
        return cut.op == "slice" and bool(cut.parts) and cut.parts[0].constant() == 1
    return term.op == "call" and term.called in ("strip", "lstrip", "removeprefix")


def _puts_space(term: Term) -> bool:
    """ " " + piece[1:]: a space where the mark was."""
    added = term.op == "op" and term.value == "+" and len(term.parts) == 2
    return added and term.parts[0].constant() == " " and _cuts_space(peel(term.parts[1]))


def _keeps_space(term: Term) -> bool:
    """replace(mark, " ") on the way to a length: the space is part of what is measured."""
    if term.op != "call" or term.called != "replace":
        return False
    old, new = (
        (term.argument(0), term.argument(1)) if term.receiver is not None else (term.argument(1), term.argument(2))
    )
    if old is None or new is None or not is_mark(old):
        return False
    return new.constant() in (" ", b" ")
