"""A gate adds the embedding of the token before, across the start of a document, where documents are scored by
themselves."""

from fairway.audit.case import Case
from fairway.audit.exemptions import departure
from fairway.audit.terms.data import is_validation
from fairway.audit.terms.smears import smears
from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, walk
from fairway.audit.terms.verdicts import clean_as_read
from fairway.audit.verdict import Finding

ID = "boundary-leak"
CHARGE = "the token before a document's start is mixed into it"
CLAUSE = 'RULES.md (b), last list, and (c) "BOS / document leak"'

_FINDING = frozenset("nonzero flatnonzero argwhere where searchsorted diff".split())  # noqa: SIM905


def check(case: Case) -> Finding:
    reading = case.reading
    apart = _by_documents(case)
    for gates in reading.gates:
        term = next(smears(gates.nodes, gates.of.streams), None)
        if term is not None:
            evidence = (
                "The embedding of the token before is added at every position, a document's first one included, "
                f"while {'documents are scored by themselves' if apart else 'the text is scored as one stream'}."
            )
            place, way = reading.place(term), reading.way(gates.of.term, term)
            if apart:
                return Finding(ID, "violates", evidence, CLAUSE, place, way)
            return departure(case, "smear-across-documents", CLAUSE, evidence, place, way)
    if not apart:
        return clean_as_read(case, ID, CLAUSE, "the text is not scored document by document")
    return clean_as_read(case, ID, CLAUSE, "nothing of the token before crosses a document's start unmasked")


def _by_documents(case: Case) -> bool:
    """Whether starts of documents are looked for in the validation text: places where an id equals one number."""
    streams = Streams()

    def test(term: Term) -> bool:
        compares = term.op == "compare" and term.value == "=="
        return compares and _is_id(term) and any(is_validation(part, streams) for part in term.parts)

    found = (event.term for event in case.reading.entry.called(*_FINDING))
    places = (term for term in found if term.called != "where" or len(term.parts) == 1)  # of three it is a choice
    return any(test(part) for term in places for part in walk(term, into=_of_places))


def _of_places(term: Term) -> bool:
    """Not what is compared in another way: how deep in its document a token stands begins no document."""
    return term.op != "compare" or term.value == "=="


def _is_id(test: Term) -> bool:
    return any(isinstance(part.constant(), int) and not isinstance(part.constant(), bool) for part in test.parts)
