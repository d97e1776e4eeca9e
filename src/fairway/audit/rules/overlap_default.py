"""The data script keeps fewer documents for validation than are scored: the rest of the scored text is trained on."""

import re
from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.preparing import as_prepared
from fairway.audit.preparing.kept_back import SCORED
from fairway.audit.records.splits import FEWEST, MOST, splits
from fairway.audit.terms.data import TOKENISERS, names_training, names_validation, words, writes
from fairway.audit.terms.program import Program
from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, peel, walk
from fairway.audit.terms.verdicts import clean
from fairway.audit.verdict import Finding, Place

ID = "overlap-default"
CHARGE = "the data script holds back fewer validation documents than are scored"
CLAUSE = 'RULES.md R5 and (c) "Train/val overlap"'


def check(case: Case) -> Finding:
    looked = []
    for program in case.reading.programs.all():
        split, does = _split(program), "keeps {:,} documents for validation"
        if not any(number.value < SCORED for number in split or ()):  # what is trained on may begin before that ends
            skipped = _skipped(program)
            split, does = skipped or split, "skips {:,} documents and makes training text of all others"
        if not split:
            continue
        looked.append(program.script.path)
        number = next((n for n in split if n.value < SCORED), None)
        if number is not None:
            evidence = (
                f"{program.script.path} {does.format(number.value)} while {SCORED:,} are scored: "
                f"the other {SCORED - number.value:,} are trained on."
            )
            return Finding(ID, "violates", evidence, CLAUSE, case.reading.place(number), case.reading.way(number))
    written = _written(case)
    if written is not None:
        return written
    if looked:
        return as_prepared(case, clean(ID, CLAUSE, f"{looked[0]} holds back as many documents as are scored"))
    unseen = "no script that parts documents into training and validation lies here"
    return as_prepared(case, clean(ID, CLAUSE, unseen))


def _written(case: Case) -> Finding | None:
    """What the values that were followed do not say: the count in the condition that turns to training text, unless a
    command gives another."""
    said = "\n".join((case.submission.readme, case.submission.command))
    for script in (each for each in case.submission.scripts if each.tree is not None):
        for split in splits(script.tree) if script.tree is not None else ():
            name = re.escape(split.name).replace("_", "[-_]")
            if split.count >= SCORED or (name and re.search(rf"{name}[ =]+\d", said, re.IGNORECASE)):
                continue
            evidence = (
                f"{script.path} keeps {split.count:,} documents out of the training text while {SCORED:,} are scored: "
                f"the other {SCORED - split.count:,} are trained on."
            )
            return Finding(ID, "violates", evidence, CLAUSE, Place(script.path, script.line(split.line)))
    return None


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


def _skipped(program: Program) -> list[Term]:
    """The numbers of documents that are passed over before training text is written, where nothing else is written and
    the documents are not said to be training text already."""
    found: list[Term] = []
    for event, what, where in writes(program):
        if names_training(where) and not _apart_before(what):
            found += [number for test in event.conditions if (number := _from_on(test, True)) is not None]
            found += _passed_over(what)
            found += _begun_later(program, what)
    return found


def _begun_later(program: Program, what: Term) -> list[Term]:
    """islice(docs, n, None), docs.skip(n) of what is written: its elements are those of what it was given."""
    below = {id(term) for term in walk(what)}
    calls = (event.term for event in program.called("islice", "skip"))
    later = [call for call in calls if len(call.parts) > _STARTS[call.called] and _is_number(call.parts[1])]
    return [call.parts[1] for call in later if any(id(one) in below for one in (call.parts[0], *call.parts[0].parts))]


def _apart_before(what: Term) -> bool:
    """Whether what is written was read from a file of training text."""
    return any(term.op == "call" and term.called in _READING and names_training(*term.parts) for term in walk(what))


_READING = frozenset(("open", "read_text", "load_dataset", "read_parquet", "read_table", "ParquetFile", "glob"))


def _passed_over(root: Term) -> Iterator[Term]:
    """Numbers of what comes first and is left out: docs[n:], range(n, m), only what a test lets through."""
    streams = Streams()
    for count, term in enumerate(walk(root)):
        if count > 20_000:
            return
        if term.op == "choice":
            arms = [{id(each) for each in walk(arm) if each.called in TOKENISERS} for arm in term.parts[1:]]
            more = [bool(one - other) for one, other in (arms, arms[::-1])]
            number = _from_on(term.parts[0], more[0]) if more[0] is not more[1] else None
            if number is not None:
                yield number
        elif term.op == "item" and term.parts[1].op == "slice" and not _is_array(term.parts[0], streams):
            yield from (bound for bound in term.parts[1].parts[:1] if _is_number(bound))
        elif term.op == "call" and term.called == "range" and len(term.parts) > 1 and _is_number(term.parts[0]):
            yield term.parts[0]


_STARTS = {"skip": 1, "islice": 2}  # parts that such a call has at least, where it does not begin at the first


def _from_on(test: Term, held: bool) -> Term | None:
    """n, where a test that holds (or does not) says that a counter has come to n."""
    if test.op == "op" and test.value == "not":
        return _from_on(test.parts[0], not held)
    if test.op == "op" and test.value == "and" and held:
        return next((number for part in test.parts if (number := _from_on(part, held)) is not None), None)
    if test.op != "compare" or test.value not in ("<", "<=", ">", ">="):
        return None
    for (counter, number), upwards in ((test.parts, (">", ">=")), (test.parts[::-1], ("<", "<="))):
        if _is_number(number) and _is_counter(counter):
            return number if (test.value in upwards) is held else None
    return None


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
    return isinstance(value, int) and not isinstance(value, bool) and FEWEST <= value <= MOST


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
