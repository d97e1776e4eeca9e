"""Validation tokens are stored in what is handed in: text that is known needs no prediction."""

from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.terms.data import counted, cut_from, is_validation, sources, stored, writes
from fairway.audit.terms.program import Program
from fairway.audit.terms.streams import Streams
from fairway.audit.terms.term import Term, peel, walk
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
    held = next(_in_buffers(reading.entry, streams), None)
    if held is not None:
        evidence = (
            "Tokens of the validation files are put into a buffer of the model, which is written out with its weights "
            "before they are scored."
        )
        return Finding(ID, "violates", evidence, CLAUSE, reading.place(held))
    return clean_as_read(case, ID, CLAUSE, "nothing that the script writes holds token ids of the validation files")


def _in_buffers(program: Program, streams: Streams) -> Iterator[Term]:
    """register_buffer("lead", tokens), or model.lead.copy_(tokens), before something is written."""
    last = max((event.order for event, _, _ in writes(program)), default=0)
    buffers: list[Term] = []
    for event in program.events:
        term = event.term
        value = term.at(2, "tensor") if term.called == "register_buffer" else None
        if value is not None:
            buffers.append(peel(value))
        elif (
            term.called == "copy_" and term.receiver is not None and any(peel(term.receiver) is one for one in buffers)
        ):
            value = term.argument(0, "src", "other")
        if value is not None and event.order < last and is_validation(value, streams):
            yield term


def _counted_up(writing: Term, term: Term, streams: Streams) -> bool:
    """Whether what is written was read through the same handle: a counter of what ranks have claimed, no text."""
    handle = writing.receiver

    def same_handle(source: Term) -> bool:  # struct.unpack("<i", handle.read(4)) reads it a call further down
        return any(each.op == "call" and each.receiver is handle for each in walk(source))

    return handle is not None and all(map(same_handle, sources(term, streams)))
