"""The denominator counts the bytes of a transformed text (marks for capitals and the like), not of the original."""

import ast
import re
from itertools import islice
from typing import Any

from fairway.audit.case import Case
from fairway.audit.preparing import as_prepared
from fairway.audit.reading.tree import last_name, nodes
from fairway.audit.terms.data import spells_capital, tokenised, words
from fairway.audit.terms.expressions import name
from fairway.audit.terms.octets import decodes_one, encoded_text, is_decoder, negated, parts_of, values
from fairway.audit.terms.program import Program
from fairway.audit.terms.sidecars import added_to_sidecar
from fairway.audit.terms.streams import Streams
from fairway.audit.terms.tables import tables_of
from fairway.audit.terms.term import Term, any_below, peel, walk
from fairway.audit.terms.totals import GATHERS, LOSSES
from fairway.audit.terms.verdicts import byte_factors, clean, counted_otherwise
from fairway.audit.verdict import Finding

ID = "byte-transformed-text"
CHARGE = "the bytes of a transformed text are the denominator"
CLAUSE = 'RULES.md R7 and (c) "Transformed-text denominator"'

_CASED = re.compile(
    r"(?<!without )(?<!no )(?<!not )(?:case.?(?:op|mark)(?!s?.?free)|caps.?op(?!s?.?free)|lossless.?cap)|\bU\+E00\d|"
    r"[_/-]caps(?=[_/.-]|$)",
    re.IGNORECASE,
)
_SENTINEL = re.compile(r"\bU\+E00\d")  # as a comment names it
_CHANGING = frozenset("lower casefold normalize translate sub subn".split())  # noqa: SIM905
_MANY = 5000  # terms of one text
_TESTS = frozenset(("isin", "in1d", "eq", "ne", "logical_or"))


def check(case: Case) -> Finding:
    return as_prepared(case, _by_terms(case))


def _by_terms(case: Case) -> Finding:
    reading = case.reading
    factors = byte_factors(case)
    for factor in factors:
        changed = next((length for length in values(factor) if _of_changed_text(length)), None)
        if changed is not None:
            evidence = "Bytes are counted in a text that was changed before, not in the original."
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(changed), reading.way(changed))
        added = _marks_of_sidecar(factor)
        if added is not None:
            evidence = "To the bytes of the sidecar others are added for tokens that stand for nothing in the original."
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(added), reading.way(added))
        length = next((length for table, length in tables_of(factor) if not _frees_marks(table)), None)
        if length is not None and not _from_sidecar(factor) and _is_transformed(case):
            evidence = (
                "The tokens are those of a transformed text with marks of its own, and their bytes are taken from "
                "its pieces, the marks included, instead of from the sidecar of original bytes."
            )
            written = _put_in(reading.entry)  # by the script that scores: no table of bytes in it was made for them
            place = reading.place(written) if written is not None else reading.place(length)
            return Finding(ID, "violates", evidence, CLAUSE, place, reading.way(length))
        decoded = next((length for length in values(factor) if _as_decoded(length)), None)
        if decoded is not None and _is_transformed(case):
            evidence = (
                "Bytes are counted in the text that the tokens decode to; that is the transformed one, with its marks, "
                "and nothing turns it back into the original."
            )
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(decoded), reading.way(decoded))
    if not factors:
        return counted_otherwise(case, ID, CLAUSE)
    return clean(ID, CLAUSE, "bytes are those of the original text, as far as the script says which text it is")


def _private(term: Term) -> bool:
    value = term.constant()
    return isinstance(value, str) and any("\ue000" <= c <= "\uf8ff" for c in value)


def _of_changed_text(length: Term) -> bool:
    """The length of a text that was folded or given marks; not of tokens decoded and changed back."""
    text = encoded_text(length)
    if text is None or any_below(text, is_decoder):
        return False
    return any_below(text, _private) or any_below(text, lambda t: t.op == "call" and t.called in _CHANGING)


def _as_decoded(length: Term) -> bool:
    """The length of decoded tokens just as they decode: no piece of a table, nothing done to the text."""
    text = encoded_text(length)
    below = peel(text) if text is not None else None
    return below is not None and is_decoder(below) and not decodes_one(below)


def _from_sidecar(factor: Term) -> bool:
    """Counts that are read from a file beside the tokens."""
    streams = Streams()
    waiting, seen = [factor], set[int]()
    while waiting:
        term = waiting.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        if streams.is_stream(term):
            return True
        if term.called in _BUFFERS or (term.op == "attr" and term.value in ("device", "dtype", "shape")):
            continue  # its size is no value of it
        if term.op == "compare" or term.called in LOSSES | GATHERS:  # a mask, a loss
            continue
        waiting.extend(term.parts[1:] if term.op == "choice" else parts_of(term))
    return False


_BUFFERS = frozenset(
    ("zeros", "empty", "full", "ones", "zeros_like", "empty_like", "full_like", "ones_like", "nonzero", "flatnonzero",
     "arange", "range")
)  # fmt: skip


def _marks_of_sidecar(factor: Term) -> Term | None:
    """sidecar + (token is a mark): a test of token ids that is added to what a file says."""
    streams = Streams()
    tested = (
        side
        for side in added_to_sidecar(factor)
        if (side.op == "compare" or (side.op == "call" and side.called in _TESTS))
        and any(streams.is_stream(below) for below in walk(side))
    )
    return next(tested, None)


def _frees_marks(table: Term) -> bool:
    """A table that knows the marks and gives them no bytes."""
    return any_below(table, lambda t: _is_sign(t.constant())) and not any_below(table, _counts_marks)


def _counts_marks(term: Term) -> bool:
    """Whether what is stored for a mark is a length as of any piece, `if piece in MARKS: size[i] = len(piece)`."""
    fork = term.parts if term.op == "choice" and len(term.parts) == 3 else ()
    if not fork or fork[0].op != "compare" or not any_below(fork[0], lambda t: _is_sign(t.constant())):
        return False
    stored = fork[2 if negated(fork[0]) else 1]
    return stored.op == "store" and encoded_text(peel(stored.parts[2])) is not None


def _is_sign(value: object) -> bool:
    """A text of a mark that no reader sees: of the private use area, or of no width."""
    return isinstance(value, str) and bool(_SIGNS.search(value)) and len(value) <= 4


def _put_in(program: Program) -> Term | None:
    """What writes such marks into the text before it is cut into tokens."""
    for _, text in tokenised(program):
        for term in islice(walk(text), _MANY):
            wrote = term.called in _WRITING and any(
                _is_sign(value) for part in _written(term) for value in _texts(part)
            )
            if wrote or spells_capital(term) or (term.op == "function" and _writes_capital(term)):
                return term
    return None


def _writes_capital(function: Term) -> bool:
    """`lambda found: MARK + found.group(0).lower()`, or the same in an f-string: what is put in for a capital."""
    for node in nodes(function.value.node):
        if isinstance(node, ast.JoinedStr):
            parts = [each.value if isinstance(each, ast.FormattedValue) else each for each in node.values]
        else:
            parts = [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else []
        signs, letters = parts[:-1], parts[-1:]
        lowered = any(isinstance(each, ast.Call) and last_name(each.func) in _LOWERING for each in letters)
        told = [_constant(each, function.value) for each in signs]
        if lowered and told and all(isinstance(sign, str) and sign.strip() and len(sign) <= _MARK for sign in told):
            return True
    return False


def _constant(node: ast.expr, function: Any) -> object:
    if isinstance(node, ast.Name):
        return name(node.id, function.frame, node.lineno).constant()
    return node.value if isinstance(node, ast.Constant) else None


_LOWERING = frozenset(("lower", "casefold"))
_MARK = 8  # characters of a mark, "<cap>"


def _written(term: Term) -> tuple[Term, ...]:
    """What a text method puts into a text: what joins, what something is replaced by."""
    if term.called == "join":
        return term.parts[:1]
    return term.parts[2:3] if term.called == "replace" and term.receiver is not None else term.parts[1:2]


def _texts(term: Term) -> list[object]:
    """A text, or the texts that a function which makes one names."""
    if term.op != "function":
        return [below.constant() for below in walk(term)]
    function = term.value
    found: list[object] = []
    for node in nodes(function.node):
        if isinstance(node, ast.Constant):
            found.append(node.value)
        elif isinstance(node, ast.Name):
            found.append(name(node.id, function.frame, node.lineno).constant())
    return found


_WRITING = frozenset(("join", "replace", "sub", "subn"))
_SIGNS = re.compile("[\ue000-\uf8ff\u200b-\u200f\u2060-\u2064\ufeff]")


def _is_transformed(case: Case) -> bool:
    """Whether the data is that of a case transform: by the names of its files, by the README, or by the script that
    makes it."""
    submission = case.submission
    if _CASED.search(submission.readme) or any(_CASED.search(path) for path in submission.sizes):
        return True
    for script in submission.scripts:
        if _SENTINEL.search(script.text):
            return True
        if script.path not in {s.path for s in submission.entry.all()} and re.search(
            r"\\u(?:e[0-9a-f]{3}|f[0-8][0-9a-f]{2})|[\ue000-\uf8ff]", script.text, re.IGNORECASE
        ):
            return True
    if case.preparations.transformed or any(map(_put_in, case.reading.programs.all())):
        return True
    paths = (event.term for event in case.reading.entry.events if event.term.called in _OPENING)
    return any(_CASED.search(word) for term in paths for word in words(term, 400))


_OPENING = frozenset("glob fromfile memmap open load join SentencePieceProcessor from_file Path exists isfile".split())  # noqa: SIM905
