"""How a denominator counts bytes: tables over the vocabulary, lengths of encoded texts, spaces added, constants.

The canonical count of a SentencePiece token is the UTF-8 length of its piece without the leading mark (U+2581), plus
one for the space that the mark stands for (not after a boundary token), and one for a byte piece.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from fairway.audit.terms.term import Term, alternatives, any_below, peel, walk

MARK = "\u2581"

Origin: TypeAlias = tuple[str, int, str, str, int]
"""File, line, kind and value of a term, and the table that it was looked up in."""

PIECES = frozenset(
    """id_to_piece IdToPiece convert_ids_to_tokens convert_id_to_token _convert_id_to_token id_to_token piece
    get_piece GetPiece""".split()  # noqa: SIM905
)
_DECODERS = frozenset("decode Decode decode_ids DecodeIds detokenize decode_pieces DecodePieces".split())  # noqa: SIM905
_LOOKUPS = frozenset("index_select take gather take_along_dim take_along_axis embedding".split())  # noqa: SIM905
_SUMS = frozenset(
    """sum nansum fsum all_reduce reduce cumsum count_nonzero int float bool mean masked_select logical_and
    clamp clamp_min clip maximum max abs einsum dot matmul mul multiply cat stack concatenate sorted""".split()  # noqa: SIM905
)


def parts_of(term: Term) -> tuple[Term, ...]:
    """What a value is made of; places (an index) are no part of it, conditions are."""
    if term.op == "item":
        return term.parts[:1]
    if term.op == "store":
        return (term.parts[0], term.parts[2])
    if term.op == "call" and term.called in _LOOKUPS:
        table = looked_up(term)
        return (table,) if table is not None else term.parts
    if (term.op == "call" and term.called in _COUNTS and not is_text_length(term)) or (
        term.op == "attr" and term.value in ("shape", "size", "ndim")
    ):
        return ()
    return term.parts


_COUNTS = frozenset(("len", "numel", "size", "dim", "nelement", "__len__"))


def values(*roots: Term) -> Iterator[Term]:
    """Every term that a value is made of, each once."""
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        term = waiting.pop()
        if id(term) not in seen:
            seen.add(id(term))
            yield term
            waiting.extend(parts_of(term))


def looked_up(term: Term) -> Term | None:
    """The table of a lookup."""
    if term.op == "item":
        return term.parts[0]
    if term.op == "call" and term.called in _LOOKUPS:
        return term.at(1, "weight") if term.called == "embedding" else term.operand("a")
    return None


def is_mark(term: Term) -> bool:
    """A constant that holds the mark of a leading space: as text, as bytes, as a code point."""
    value = term.constant()
    if isinstance(value, str):
        return MARK in value
    if isinstance(value, bytes):
        return MARK.encode() in value
    return isinstance(value, int) and value == ord(MARK)


def counts_bytes(term: Term) -> bool:
    """Whether a factor is a count of bytes: lengths of texts, a table over the vocabulary, sizes from a file."""
    return any(is_byte_source(one) for one in values(term))


_FILE_DATA = frozenset(
    """fromfile memmap frombuffer load open_memmap read_bytes getsize stat unpack open readinto""".split()  # noqa: SIM905
)


def is_byte_source(term: Term) -> bool:
    if is_text_length(term) or (term.op == "item" and has_mark(term.parts[0])):
        return True
    if term.op == "attr" and term.value == "st_size":
        return True
    return term.op == "call" and (term.called in _FILE_DATA or term.called in PIECES or is_decoder(term))


def has_mark(term: Term) -> bool:
    return any_below(term, is_mark)


def is_byte_test(term: Term) -> bool:
    """Whether something tells byte pieces from others: is_byte, or the shape <0x..>."""
    if term.op == "call" and term.called in ("is_byte", "IsByte"):
        return True
    if term.op == "attr" and term.value == "type":  # of a piece in the model's protocol buffer
        return True
    value = term.constant()
    return isinstance(value, str) and ("<0x" in value or "0x%" in value)


def is_text_length(term: Term) -> bool:
    """len(text.encode()): bytes of a text."""
    return encoded_text(term) is not None


def encoded_text(term: Term) -> Term | None:
    """The text whose encoded length this is."""
    if term.op != "call" or term.called not in ("len", "__len__"):
        return None
    below = peel(term.parts[0]) if term.parts else None
    while below is not None and below.op == "call" and below.called == "replace" and below.receiver is not None:
        below = peel(below.receiver)  # bytes.replace
    if below is None:
        return None
    options = alternatives(below, 6)
    if len(options) > 1 and all(one.called == "encode" for one in options):
        return below
    if below.called in ("encode", "bytes"):
        return below.operand()
    return _held_text(below)


def _held_text(lookup: Term) -> Term | None:
    """len(spelt[token]) of a table of encoded texts: the texts in it."""
    table = lookup.receiver if lookup.called == "get" else lookup.parts[0] if lookup.op == "item" else None
    if table is None:
        return None
    texts: list[Term] = []
    waiting, seen = [table], set[int]()
    while waiting and len(seen) < 200:
        term = waiting.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        if term.op == "store" and term.value is None:
            waiting.extend((term.parts[0], term.parts[2]))
        elif term.op in ("list", "merge", "mutate"):
            waiting.extend(term.parts)
        elif term.op == "dict":
            waiting.extend(term.parts[1::2])
        elif term.op == "choice":
            waiting.extend(term.parts[1:])
        elif term.op == "call" and term.called in ("list", "tuple"):
            waiting.extend(term.parts)
        elif term.op == "call" and term.called == "encode":
            texts.append(term)
        elif not (term.op == "const" and isinstance(term.value, (bytes, type(None)))):
            return None
    return Term("merge", tuple(texts), None, lookup.file, lookup.line) if texts else None


def piece_of(text: Term) -> Term | None:
    """The call that names a piece of the vocabulary in this text, or decodes a single token."""
    for term in values(text):
        if term.op == "call" and term.called in PIECES:
            return term
        if term.op == "attr" and term.value in PIECES:
            return term
        if term.op == "call" and term.called in _DECODERS and decodes_one(term):
            return term
    return None


def decodes_one(term: Term) -> bool:
    """decode([i]), decode(i) of a loop's number: one token of the vocabulary at a time."""
    given = term.at(1, "ids", "token_ids", "input") if term.receiver is not None else term.argument(0)
    if given is None:
        return False
    given = given if given.op == "list" else peel(given)
    if given.op == "list" and given.value != "comp":
        return len(given.parts) == 1
    return given.op in ("each", "round") and any_below(given, lambda t: t.op == "call" and t.called == "range")


def is_decoder(term: Term) -> bool:
    return term.op == "call" and term.called in _DECODERS and term.receiver is not None


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
            yes, no = said and not _negated(term.parts[0]), said and _negated(term.parts[0])
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
            return self.of(column, marked, id(column), depth)
        if term.op == "compare":
            return self._one(term, table) if self.has_mark(term) else NONE
        return self._call(term, marked, table, depth) if term.op == "call" else NONE

    def _operation(
        self, term: Term, sign: str, parts: tuple[Term, ...], marked: bool, table: int, depth: int
    ) -> Spaces:
        if sign in ("+", ".add_", "add", "plus"):
            return self.of(parts[0], marked, table, depth) | self.of(parts[1], marked, table, depth)
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

    def _call(self, term: Term, marked: bool, table: int, depth: int) -> Spaces:
        word = term.called
        if encoded_text(term) is not None:
            kept = next((below for below in walk(term) if _keeps_space(below)), None)
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


def _factors_of(term: Term) -> list[Term]:
    term = peel(term)
    if term.op == "op" and term.value == "*":
        return [factor for part in term.parts for factor in _factors_of(part)]
    return [term]


def named(text: Term) -> bool:
    """Whether a text is a piece by its name in the vocabulary; decoded text has no mark."""
    piece = piece_of(text)
    return piece is not None and not (piece.op == "call" and "ecode" in piece.called)


def _negated(test: Term) -> bool:
    return (test.op == "op" and test.value == "not") or (test.op == "compare" and test.value in ("!=", "not in"))


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


def tables_of(factor: Term) -> Iterator[tuple[Term, Term]]:
    """(table, length) for each table over the vocabulary in a count of bytes: the whole of what the table is made of,
    and a length of a text that it holds. A length that stands in no table is its own."""
    for term in values(factor):
        table = looked_up(term)
        if table is None or not _is_filled(table):
            continue
        for below in values(table):
            if is_text_length(below):
                yield table, below
    for term in values(factor):
        if is_text_length(term):
            yield factor, term


def _is_filled(table: Term) -> bool:
    """Whether the script itself filled the table: by stores, or as a list over the vocabulary."""
    return any(
        below.op == "store" or (below.op == "list" and below.parts) or below.op == "mutate" for below in values(table)
    )


def has_byte_test(table: Term) -> bool:
    return any_below(table, is_byte_test)


def three_for_a_byte(table: Term) -> Term | None:
    """The constant above 1 that a byte piece counts as."""
    for term in values(table):
        if term.op != "choice" or not _says_byte(term.parts[0]):
            continue
        for below in _stored(term.parts[1]):
            value = below.constant()
            if isinstance(value, (str, bytes)):
                value = len(value.encode() if isinstance(value, str) else value)
            if isinstance(value, int) and not isinstance(value, bool) and value in (2, 3, 6):
                return below
    return None


def text_for_a_byte(table: Term) -> Term | None:
    """The length of a text that a byte piece counts as: of the sign that it is decoded to, of its name."""
    for term in values(table):
        if term.op != "choice" or not _says_byte(term.parts[0]):
            continue
        for below in _stored(term.parts[1]):
            for part in below.parts if below.op == "tuple" else (below,):
                text = encoded_text(peel(part))
                if text is not None and text.op != "list" and piece_of(text) is not None:
                    return part
    return None


def _says_byte(test: Term) -> bool:
    """Whether a condition says that a piece is a byte piece; not where it says that it is none."""
    if test.op == "op" and test.value == "not":
        return False
    if test.op == "compare" and test.value in ("!=", "not in"):
        return False
    if test.op == "op" and test.value in ("and", "or", "&", "|"):
        return any(_says_byte(part) for part in test.parts)
    return any_below(test, is_byte_test)


def _stored(arm: Term) -> list[Term]:
    """The value that an arm stands for: itself, or what it stores last."""
    arm = peel(arm)
    return [peel(arm.parts[2])] if arm.op == "store" else [arm]


def marked(table: Term, length: Term) -> bool:
    """Whether a length reaches its table with the mark on: nothing takes it off the text, no condition on the way asks
    for it, and nothing that asks for it is taken off the number."""
    waiting, seen = [table], set[int]()
    while waiting and len(seen) < 4000:
        term = waiting.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        if term is length:
            return not any_below(length, is_mark)
        parts = parts_of(term)
        if term.op == "store":
            parts = () if has_mark(term.parts[1]) else parts  # size[lead] -= 3
        elif term.op == "choice" and has_mark(term.parts[0]):
            parts = ()
        elif term.op not in _HOLDING and not (term.op == "op" and term.value == "+"):
            parts = tuple(p for p in parts if not any(has_mark(other) for other in term.parts if other is not p))
        waiting.extend(parts)
    return False


_HOLDING = frozenset(("list", "tuple", "dict", "merge", "choice", "set", "each", "round", "item"))
