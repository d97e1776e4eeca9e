"""Tables over the vocabulary in a count of bytes: what they hold for byte pieces, and whether the mark is still on."""

from collections.abc import Iterator

from fairway.audit.terms.octets import (
    encoded_text,
    has_mark,
    is_byte_test,
    is_text_length,
    looked_up,
    parts_of,
    piece_of,
    values,
)
from fairway.audit.terms.term import Below, Term, peel


def tables_of(factor: Term) -> Iterator[tuple[Term, Term]]:
    """(table, length) for each table over the vocabulary in a count of bytes: the whole of what the table is made of,
    and a length of a text that it holds. A length that stands in no table is its own."""
    found = {id(table): table for table in map(looked_up, values(factor)) if table is not None}
    for table in found.values():
        if not (_is_filled(table) and _holds_a_length(table)):
            continue
        for below in values(table):
            if is_text_length(below):
                yield table, below
    for term in values(factor):
        if is_text_length(term):
            yield factor, term


def _fills(term: Term) -> bool:
    """Whether the script itself fills a table here: by stores, or as a list over the vocabulary."""
    return term.op in ("store", "mutate") or (term.op == "list" and bool(term.parts))


_is_filled = Below(_fills, parts=parts_of)
_holds_a_length = Below(is_text_length, parts=parts_of)
has_byte_test = Below(is_byte_test)


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


def text_on_the_way(table: Term) -> Term | None:
    """The length of a text that a byte piece counts as, followed through the conditions: which arm is a byte piece's,
    where one of them asks for it, and no control piece's."""
    waiting, seen = [(table, False)], set[tuple[int, bool]]()
    while waiting and len(seen) < 2000:
        term, asked = waiting.pop()
        if (id(term), asked) in seen:
            continue
        seen.add((id(term), asked))
        text = encoded_text(term)
        if text is not None:
            if asked and text.op != "list" and piece_of(text) is not None:
                return term
            continue
        held = _true_of_a_byte(term.parts[0]) if term.op == "choice" else None
        if held is not None:
            by_byte = asked or has_byte_test(term.parts[0])
            waiting.append((term.parts[1] if held else term.parts[2], by_byte))
        elif term.op == "store" and has_byte_test(term.parts[1]):
            waiting.append((term.parts[2], asked))
        else:
            parts = term.parts[1:] if term.op == "choice" else parts_of(term)
            waiting.extend((part, asked) for part in parts)
    return None


_OTHERS = frozenset(
    ("is_control", "is_unknown", "is_unused", "is_user_defined", "IsControl", "IsUnknown", "IsUnused", "IsUserDefined")
)


def _true_of_a_byte(test: Term, depth: int = 8) -> bool | None:
    """Whether a condition holds for a byte piece, which is no other kind and has no mark; None where nothing tells."""
    if test.op == "op" and test.value in ("not", "~") and depth:
        inner = _true_of_a_byte(test.parts[0], depth - 1)
        return None if inner is None else not inner
    if test.op == "op" and test.value in ("and", "or", "&", "|") and depth:
        found = {_true_of_a_byte(part, depth - 1) for part in test.parts}
        strong = test.value in ("or", "|")
        return strong if strong in found else None if None in found else not strong
    if test.op == "call" and test.called in _OTHERS:
        return False
    if test.op == "call" and test.called in ("is_byte", "IsByte"):
        return True
    if test.op == "call" and test.called == "startswith" and has_mark(test):
        return False
    return None


def _says_byte(test: Term) -> bool:
    """Whether a condition says that a piece is a byte piece; not where it says that it is none."""
    if test.op == "op" and test.value == "not":
        return False
    if test.op == "compare" and test.value in ("!=", "not in"):
        return False
    if test.op == "op" and test.value in ("and", "or", "&", "|"):
        return any(_says_byte(part) for part in test.parts)
    return has_byte_test(test)


def _stored(arm: Term) -> list[Term]:
    """The value that an arm stands for: itself, or what it stores or appends last."""
    arm = peel(arm)
    if arm.op == "mutate" and arm.value == ".append":
        return [peel(arm.parts[-1])]
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
            return not has_mark(length)
        parts = parts_of(term)
        if term.op == "store":
            parts = () if has_mark(term.parts[1]) else parts  # size[lead] -= 3
        elif term.op == "choice" and has_mark(term.parts[0]):
            parts = ()
        elif term.op not in _HOLDING:
            adds = term.op == "op" and term.value == "+"  # len(piece) + leads keeps the mark, -3 + len(piece) does not
            parts = tuple(p for p in parts if not any(_corrects(o, adds) for o in term.parts if o is not p))
        waiting.extend(parts)
    return False


def _corrects(other: Term, adds: bool) -> bool:
    """Whether what stands beside a length asks for the mark; beside a plus only with a number below nought."""
    return has_mark(other) and (not adds or _has_negative(other))


def _is_negative(term: Term) -> bool:
    return term.op == "const" and type(term.value) in (int, float) and term.value < 0


_has_negative = Below(_is_negative)
_HOLDING = frozenset(("list", "tuple", "dict", "merge", "choice", "set", "each", "round", "item"))
