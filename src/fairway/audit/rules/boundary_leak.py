"""A gate adds the embedding of the token before, across the start of a document that is scored by itself."""

from fairway.audit.case import Case
from fairway.audit.exemptions import departure
from fairway.audit.terms.term import Term, any_below, peel, same, walk
from fairway.audit.terms.verdicts import clean_as_read
from fairway.audit.verdict import Finding

ID = "boundary-leak"
CHARGE = "the token before a document's start is mixed into it"
CLAUSE = 'RULES.md (b), last list, and (c) "BOS / document leak"'

_FINDING = frozenset("nonzero flatnonzero argwhere where searchsorted diff".split())  # noqa: SIM905
_JOINING = frozenset("cat concatenate stack pad roll concat".split())  # noqa: SIM905


def check(case: Case) -> Finding:
    reading = case.reading
    apart = _by_documents(case)
    for gates in reading.gates:
        for term in gates.nodes:
            if _smears(term) and not _is_shut(term):
                evidence = (
                    "The embedding of the token before is added at every position, a document's first one included, "
                    f"while {'documents are scored by themselves' if apart else 'the text is scored as one stream'}."
                )
                return departure(
                    case,
                    "smear-across-documents",
                    CLAUSE,
                    evidence,
                    reading.place(term),
                    reading.way(gates.of.term, term),
                )
    if not apart:
        return clean_as_read(case, ID, CLAUSE, "the text is not scored document by document")
    return clean_as_read(case, ID, CLAUSE, "nothing of the token before crosses a document's start unmasked")


def _by_documents(case: Case) -> bool:
    """Whether starts of documents are looked for: places where a token id equals one number."""
    for event in case.reading.entry.called(*_FINDING):
        if any_below(event.term, lambda t: t.op == "compare" and t.value == "==" and _is_id(t)):
            return True
    return False


def _is_id(test: Term) -> bool:
    return any(isinstance(part.constant(), int) and not isinstance(part.constant(), bool) for part in test.parts)


def _smears(term: Term) -> bool:
    """e + gate * shifted(e)."""
    if term.op != "op" or term.value != "+":
        return False
    for whole, product in (term.parts, term.parts[::-1]):
        below = peel(product)
        if below.op == "op" and below.value == "*" and any(_is_shift(part, whole) for part in below.parts):
            return True
    return False


def _is_shift(term: Term, whole: Term) -> bool:
    """The same values one position later: [0, e[:-1]], a roll, a buffer whose [1:] was set to e[:-1]."""
    below = peel(term)
    if below.op == "call" and below.called == "roll":
        return any(same(part, whole, 6) for part in below.parts)
    if below.op == "call" and below.called in _JOINING:
        return any_below(below, lambda t: _is_before(t, whole))
    if below.op == "store":
        return _is_before(peel(below.parts[2]), whole) or _is_shift(below.parts[0], whole)
    if below.op == "call" and below.called in ("where", "masked_fill"):
        return any(_is_shift(part, whole) for part in below.parts)
    return False


def _is_before(term: Term, whole: Term) -> bool:
    """e[:-1], e[:, :-1]."""
    if term.op != "item" or not (term.parts[0] is peel(whole) or same(term.parts[0], whole, 6)):
        return False
    index = term.parts[1]
    slices = [part for part in (index.parts if index.op == "tuple" else (index,)) if part.op == "slice"]
    return any(part.parts[1].constant() == -1 for part in slices if len(part.parts) == 3)


def _is_shut(term: Term) -> bool:
    """Whether something that compares token ids stands in what is added."""
    whole, product = (
        term.parts if peel(term.parts[1]).op == "op" and peel(term.parts[1]).value == "*" else term.parts[::-1]
    )
    below_whole = {id(t) for t in _below(whole)}
    return any(
        (t.op == "compare" and t.value in ("==", "!=")) or (t.op == "call" and t.called in ("eq", "ne", "isin"))
        for t in _below(product)
        if id(t) not in below_whole
    )


def _below(term: Term) -> list[Term]:
    return list(walk(term))
