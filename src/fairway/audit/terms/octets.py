"""How a denominator counts bytes: tables over the vocabulary, lengths of encoded texts, spaces added, constants.

The canonical count of a SentencePiece token is the UTF-8 length of its piece without the leading mark (U+2581), plus
one for the space that the mark stands for (not after a boundary token), and one for a byte piece.
"""

from collections.abc import Iterator

from fairway.audit.terms.term import Below, Term, alternatives, any_below, peel

MARK = "\u2581"

PIECES = frozenset(
    """id_to_piece IdToPiece convert_ids_to_tokens convert_id_to_token _convert_id_to_token id_to_token piece
    get_piece GetPiece""".split()  # noqa: SIM905
)
_DECODERS = frozenset("decode Decode decode_ids DecodeIds detokenize decode_pieces DecodePieces".split())  # noqa: SIM905
_LOOKUPS = frozenset("index_select take gather take_along_dim take_along_axis embedding".split())  # noqa: SIM905


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
        term.op == "attr" and term.value in ("shape", "size", "ndim", "device", "dtype")
    ):
        return ()
    if term.op == "call" and (term.called in _POSITIONS or is_spelt_number(term)):
        return ()
    return term.parts


def is_spelt_number(term: Term) -> bool:
    """int(piece[3:5], 16), bytes.fromhex(piece[3:5]): what a byte piece says of its byte is no text of the piece."""
    spelt = term.called == "int" and term.argument(1, "base") is not None
    return spelt or term.called == "fromhex"


_COUNTS = frozenset(("len", "numel", "size", "dim", "nelement", "__len__"))
_POSITIONS = frozenset(("nonzero", "flatnonzero", "argwhere", "searchsorted"))
"""Where something stands in the tokens of a file: what lies between two such places is a number of tokens."""


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


has_mark = Below(is_mark)


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


def named(text: Term) -> bool:
    """Whether a text is a piece by its name in the vocabulary; decoded text has no mark."""
    piece = piece_of(text)
    return piece is not None and not (piece.op == "call" and "ecode" in piece.called)


def negated(test: Term) -> bool:
    return (test.op == "op" and test.value == "not") or (test.op == "compare" and test.value in ("!=", "not in"))
