"""The text is made easier before it is scored: case folded, characters normalised, rare tokens replaced."""

import itertools

from fairway.audit.case import Case
from fairway.audit.preparing import as_prepared
from fairway.audit.terms.choices import is_mask
from fairway.audit.terms.data import TOKENISERS, names_training, names_validation, spells_capital, tokenised, writes
from fairway.audit.terms.octets import is_decoder
from fairway.audit.terms.program import Program
from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, any_below, peel, walk
from fairway.audit.terms.verdicts import clean_as_read
from fairway.audit.verdict import Finding

ID = "lossy-text"
CHARGE = "the scored text is an easier one than the original"
CLAUSE = 'RULES.md R7 and (c) "Lossy text normalisation"'

_FOLDING = frozenset("lower casefold upper normalize unidecode swapcase normalize_str NFKC NFKD".split())  # noqa: SIM905
_SPACES = frozenset((r"\s+", r"\s{2,}", r"\s\s+", " +", "  +", " {2,}", r"[ \t]+", r"[ \t\n]+"))


def check(case: Case) -> Finding:
    return as_prepared(case, _by_terms(case))


def _by_terms(case: Case) -> Finding:
    reading = case.reading
    for program in reading.programs.all():
        scored = program is reading.entry
        for call, text in tokenised(program):
            folded = _folded(text)
            if folded is not None and (not scored or _reaches(case, call) or _written(program, call) or _retold(text)):
                evidence = (
                    f"The text goes through {folded.called}() before it is cut into tokens and nothing keeps what that "
                    "takes away: the score is that of an easier text."
                )
                return Finding(ID, "violates", evidence, CLAUSE, reading.place(folded), reading.way(call, folded))
    table = _led_through_folded(case)
    if table is not None:
        evidence = (
            "Tokens are replaced by those of their folded texts before they are scored: the score is that of an easier "
            "text."
        )
        return Finding(ID, "violates", evidence, CLAUSE, reading.place(table), reading.way(table))
    replaced = _replaced(case)
    if replaced is not None:
        evidence = "Token ids of the validation text are replaced by another before they are scored."
        return Finding(ID, "violates", evidence, CLAUSE, reading.place(replaced), reading.way(replaced))
    dropped = _dropped(case)
    if dropped is not None:
        evidence = (
            "Tokens are dropped from the validation text by what their pieces are before it is scored: the rest does "
            "not say what stood there."
        )
        return Finding(ID, "violates", evidence, CLAUSE, reading.place(dropped), reading.way(dropped))
    return clean_as_read(case, ID, CLAUSE, "no text is folded or normalised on its way to the scored tokens")


def _folded(text: Term) -> Term | None:
    """The call that folds a text. Marks of a reversible transform that are written into it say what its folding took
    away, of the case of letters; what a compatibility form joins they do not part again."""
    found = joined = None
    marked = False
    for term in itertools.islice(walk(text, into=lambda one: one.op != "compare"), 5000):
        if term.op == "const" and isinstance(term.value, str) and any("\ue000" <= c <= "\uf8ff" for c in term.value):
            marked = True
        if spells_capital(term):
            marked = True
        if term.op == "call" and term.called in _FOLDING and _of_text(term):
            found = found or term
            joined = joined or (term if _joins(term) else None)
        if _of_spaces(term):
            found, joined = found or term, joined or term
        if (
            term.op == "call"
            and term.called == "encode"
            and any(p.constant() in ("ignore", "replace") for p in term.parts)
        ):
            found = found or term
    return joined if marked else found


def _of_spaces(term: Term) -> bool:
    """`" ".join(text.split())` and `re.sub(r"\\s+", " ", text)`: runs of spaces and ends of lines become one space."""
    if term.op != "call":
        return False
    if term.called == "sub":
        told = [part.constant() for part in term.parts]
        return any(isinstance(each, str) and each in _SPACES for each in told)
    parted = [peel(part) for part in term.parts if peel(part).called == "split"]
    return term.called == "join" and any(len(each.parts) == 1 for each in parted)


def _joins(term: Term) -> bool:
    """Whether a call gives different signs one form: NFKC, NFKD, plain letters for all."""
    forms = {term.called, *(part.constant() for part in term.parts if isinstance(part.constant(), str))}
    return bool(forms & {"NFKC", "NFKD", "unidecode"})


def _of_text(term: Term) -> bool:
    """unicodedata.normalize and methods of a text; not a vector's normalisation."""
    return (
        term.called != "normalize"
        or str(term.value).startswith("unicodedata")
        or any(isinstance(part.constant(), str) for part in term.parts)
    )


def _reaches(case: Case, call: Term) -> bool:
    """Whether tokens of this call are scored, as they come or gathered in a list before."""
    return any(
        call in one.streams.chain(target).values() or any_below(target, lambda term: term is call)
        for one in case.reading.contributions
        for target in one.targets
    )


def _retold(text: Term) -> bool:
    """Whether it is the validation text, decoded out of its own tokens: these are cut anew."""
    return any_below(text, is_decoder) and names_validation(text)


def _written(program: Program, call: Term) -> bool:
    """Whether tokens of this call go into a file of tokens that the script prepares itself."""
    for _, what, where in writes(program):
        named = names_training(where) or names_validation(where)
        if named and any_below(what, lambda term: term is call):
            return True
    return False


def _replaced(case: Case) -> Term | None:
    """text[rare] = 3 on the way from the file to the target."""
    for one in case.reading.contributions:
        for target in one.targets:
            for term in one.streams.chain(target).values():
                if term.op != "store" or not _from_file(term.parts[0], one.streams):
                    continue
                value = peel(term.parts[2]).constant()
                if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                    return term
    return None


def _dropped(case: Case) -> Term | None:
    """text[keep] on the way from the file to the target, where a table, or a file of lengths, says of each token of
    the text itself whether it is kept; text[text != padding] is what a reader of shards does."""
    for one in case.reading.contributions:
        for target in one.targets:
            for term in one.streams.chain(target).values():
                if term.op == "item" and _from_file(term, one.streams) and _by_its_tokens(term, one.streams):
                    return term
    return None


def _by_its_tokens(item: Term, streams: Streams) -> bool:
    base, keep = item.parts
    if not is_mask(keep):
        return False
    own = set(streams.chain(base))
    for term in itertools.islice(walk(keep), 400):
        told = term.op == "item" and any(part in own for part in streams.chain(term.parts[1]))
        listed = term.op == "call" and term.called in _LISTS and any(id(part) in own for part in term.parts)
        beside = term.op == "compare" and _of_a_number(term, own, streams)
        if told or listed or beside:
            return True
    return False


def _of_a_number(term: Term, own: set[int], streams: Streams) -> bool:
    """lengths > 0, of another file's numbers; not a place that is held against another."""
    one, other = term.parts[:2]
    if one.constant() is not None:
        one, other = other, one
    return isinstance(other.constant(), (int, float)) and id(one) not in own and streams.is_stream(one)


_LISTS = frozenset(("isin", "in1d"))

_NUMBERING = frozenset("piece_to_id PieceToId token_to_id convert_tokens_to_ids".split()) | TOKENISERS  # noqa: SIM905


def _led_through_folded(case: Case) -> Term | None:
    """table[tokens] where the table gives each token the number of its folded text: of all that are made with such a
    table, a row of counts by folded tokens among them, the one with the least below it."""
    found: list[tuple[int, Term]] = []
    for one in case.reading.contributions:
        for term in one.below(one.term):
            if term.op != "item" or not one.streams.is_stream(term.parts[1]):
                continue
            table = list(itertools.islice(walk(term.parts[0]), 5000))
            numbered = any(map(_numbers, table)) or _numbers_pieces(table)
            folding = next((b for b in table if b.op == "call" and b.called in _FOLDING and _of_text(b)), None)
            if numbered and folding is not None:
                found.append((len(table), term))
    return min(found, key=lambda each: each[0])[1] if found else None


def _numbers(term: Term) -> bool:
    """tokenizer.encode(text), sp.piece_to_id(piece): numbers of tokens. piece.encode("utf-8") makes bytes of it."""
    bytes_of = term.called == "encode" and all(isinstance(part.constant(), str) for part in term.parts[1:])
    return term.called in _NUMBERING and not bytes_of


def _numbers_pieces(table: list[Term]) -> bool:
    """ids.get(piece.lower(), i), ids[piece.lower()], where a dict gives each piece its number."""
    spelt = any(below.called in ("id_to_piece", "IdToPiece") for below in table)
    asked = (below for below in table if below.called == "get" or below.op == "item")
    keys = (below.parts[1] for below in asked if len(below.parts) > 1)
    return spelt and any(any_below(key, lambda term: term.called in _FOLDING) for key in keys)


def _from_file(base: Term, streams: Streams) -> bool:
    """Data as it was read, not a buffer that is being filled."""
    if not streams.is_stream(base):
        return False
    below = peel(base)
    while below.op in ("merge", "choice", "store", "item", "round", "each"):
        below = peel(below.parts[1] if below.op == "choice" else below.parts[0])
    return below.op == "call" and not below.called.startswith(("zeros", "empty", "full", "ones", "new_"))
