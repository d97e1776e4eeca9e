"""Validation tokens are stored in what is handed in: text that is known needs no prediction."""

from fairway.audit.case import Case
from fairway.audit.terms.data import counted, cut_from, is_validation, sources, stored, writes
from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, walk
from fairway.audit.terms.verdicts import clean_as_read
from fairway.audit.verdict import Finding

ID = "paid-prefix"
CHARGE = "validation tokens are stored in the artifact"
CLAUSE = 'RULES.md R5 and (c) "Val-only training, paid prefix"'


def check(case: Case) -> Finding:
    reading = case.reading
    streams = Streams()
    for event, what, _where in writes(reading.entry):
        for term in stored(what):
            if is_validation(term, streams) and not _counted_up(event.term, term, streams):
                evidence = (
                    "Tokens of the validation files are written out by the script itself, so that their positions can "
                    "be scored from what was stored."
                )
                way = reading.way(event.term, term)
                return Finding(ID, "violates", evidence, CLAUSE, reading.place(cut_from(term, streams)), way)
        said = [number.event.order for number in reading.reported]
        before = not event.loops and (not said or event.order < max(said))  # in a loop it follows what is scored there
        filled = next(counted(what, streams), None) if before else None
        if filled is not None:
            evidence = "A table that counts the tokens of the validation files is written out before they are scored."
            way = reading.way(event.term, filled)
            return Finding(ID, "violates", evidence, CLAUSE, reading.place(filled), way)
    return clean_as_read(case, ID, CLAUSE, "nothing that the script writes holds token ids of the validation files")


def _counted_up(writing: Term, term: Term, streams: Streams) -> bool:
    """Whether what is written was read through the same handle: a counter of what ranks have claimed, no text."""
    handle = writing.receiver

    def same_handle(source: Term) -> bool:  # struct.unpack("<i", handle.read(4)) reads it a call further down
        return any(each.op == "call" and each.receiver is handle for each in walk(source))

    return handle is not None and all(map(same_handle, sources(term, streams)))
