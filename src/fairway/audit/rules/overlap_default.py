"""The data script keeps fewer documents for validation than are scored: the rest of the scored text is trained on."""

from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.terms.data import names_training, names_validation, words, writes
from fairway.audit.terms.program import Program
from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, peel, walk
from fairway.audit.terms.verdicts import clean
from fairway.audit.verdict import Finding

ID = "overlap-default"
CHARGE = "the data script holds back fewer validation documents than are scored"
CLAUSE = 'RULES.md R5 and (c) "Train/val overlap"'

SCORED = 50_000  # documents of the challenge's validation split
_FEWEST = 500  # below it a number is no count of held-out documents


def check(case: Case) -> Finding:
    looked = []
    for program in case.reading.programs.all():
        split = _split(program)
        if split is None:
            continue
        looked.append(program.script.path)
        number = next((n for n in split if n.value < SCORED), None)
        if number is not None:
            evidence = (
                f"{program.script.path} keeps {number.value:,} documents for validation while {SCORED:,} are scored: "
                f"the other {SCORED - number.value:,} are trained on."
            )
            return Finding(ID, "violates", evidence, CLAUSE, case.reading.place(number), case.reading.way(number))
    if looked:
        return clean(ID, CLAUSE, f"{looked[0]} holds back as many documents as are scored")
    return clean(ID, CLAUSE, "no script that splits documents into training and validation lies here")


def _split(program: Program) -> list[Term] | None:
    """The numbers that part what is written as validation from what is written as training; None for a program that
    writes no such two."""
    kept, trained = [], False
    for event, what, where in writes(program):
        names = [where, *event.conditions]
        if names_training(where):
            trained = True
        if names_validation(where) or (names_training(where) and any("val" in w.lower() for w in words(where))):
            kept += [number for part in (what, *names) for number in _numbers(part, program)]
    return kept if trained and kept else None


def _numbers(root: Term, program: Program) -> Iterator[Term]:
    """Whole numbers that a counter of documents is compared with, or that a list of documents is cut at."""
    streams = Streams()
    for count, term in enumerate(walk(root)):
        if count > 20_000:
            return
        if term.op == "compare" and term.value in ("<", "<=", ">", ">=", "=="):
            for number, other in (term.parts, term.parts[::-1]):
                if _is_number(number) and _is_counter(other):
                    yield number
        elif term.op == "item" and term.parts[1].op == "slice" and not _is_array(term.parts[0], streams):
            yield from (bound for bound in term.parts[1].parts[:2] if _is_number(bound))
        elif term.op == "call" and term.called in ("islice", "take", "head", "skip", "select", "range"):
            yield from (part for part in term.parts if _is_number(part))


def _is_number(term: Term) -> bool:
    value = term.constant()
    return isinstance(value, int) and not isinstance(value, bool) and _FEWEST <= value <= 1_000_000


def _is_counter(term: Term) -> bool:
    """Counts one by one: enumerate, a range, or n += 1."""
    below = peel(term)
    if below.op == "item" and below.parts[0].op == "each" and below.parts[1].constant() == 0:
        return True
    if below.op == "each":
        return below.parts[0].op == "call" and below.parts[0].called in ("range", "count", "enumerate")
    if below.op in ("merge", "choice"):
        return any(_is_counter(part) for part in below.parts[-2:])
    if below.op == "op" and below.value == "+":
        return below.parts[1].constant() == 1
    return below.op == "const" and type(below.value) is int


def _is_array(base: Term, streams: Streams) -> bool:
    """Token ids or bytes, whose slices count tokens and not documents."""
    below = peel(base)
    return streams.is_stream(below) or (below.op == "call" and below.called in ("zeros", "empty", "read", "encode"))
