"""Which data token ids come from, and what is written where."""

import re
from collections.abc import Iterator

from fairway.audit.terms.program import Program
from fairway.audit.terms.report import is_loss
from fairway.audit.terms.streams import Streams, carried
from fairway.audit.terms.term import Term, peel, walk
from fairway.audit.terms.things import Event

_VALIDATION = re.compile(r"(?<![a-z])val(?![a-z]*ue)|valid|held.?out|heldout", re.IGNORECASE)
_TRAINING = re.compile(r"train", re.IGNORECASE)
_WRITERS = frozenset(
    [
        "write",
        "write_bytes",
        "write_text",
        "dump",
        "save",
        "tofile",
        "savez",
        "savez_compressed",
        "save_file",
        "writelines",
    ]
)
_PACKERS = frozenset(
    """compress tobytes dumps astype encode decode join a85encode b85encode b64encode b32encode b16encode hexlify hex
    tolist pack getvalue ascontiguousarray view bytes
    bytearray asarray array packbits save_to_bytes copy stack cat concat concatenate vstack hstack
    frombuffer reshape items values""".split()  # noqa: SIM905
)

TOKENISERS = frozenset("encode EncodeAsIds encode_as_ids encode_ordinary encode_batch tokenize Encode".split())  # noqa: SIM905
_CODECS = ("utf-8", "utf8", "ascii", "latin-1", "latin1", "utf-16", "utf-32")


def words(term: Term, limit: int = 3000) -> Iterator[str]:
    """Literal texts below a term."""
    for count, below in enumerate(walk(term)):
        if count > limit:
            return
        if below.op == "const" and isinstance(below.value, str):
            yield below.value


def names_validation(*terms: Term) -> bool:
    """Whether a path (a pattern, a file's name) names the validation split and not the training split."""
    said = [word for term in terms for word in words(term)]
    return any(_VALIDATION.search(word) for word in said) and not any(_TRAINING.search(word) for word in said)


def names_training(*terms: Term) -> bool:
    return any(_TRAINING.search(word) for term in terms for word in words(term))


def sources(term: Term, streams: Streams) -> list[Term]:
    """The reads of files that token ids come from."""
    return [
        one
        for one in streams.chain(term).values()
        if one.op == "call" and not any(map(streams.is_stream, carried(one)))
    ]


def is_validation(term: Term, streams: Streams) -> bool:
    """Token ids of validation files, by the paths that they were read from."""
    if not streams.is_stream(term):
        return False
    for source in sources(term, streams):
        if id(source) not in streams.validation:
            streams.validation[id(source)] = source, _of_validation(source, streams)
        if streams.validation[id(source)][1]:
            return True
    return False


def _of_validation(source: Term, streams: Streams) -> bool:
    """Whether a read names the validation split; of bytes that the script packed itself, whether they were such ids."""
    if source.called not in ("frombuffer", "unpack"):
        said = [part for part in source.parts if names_validation(part) or names_training(part)]
        return names_validation(*said[:1])  # the file; how much of it is read may be looked up beside other files
    packed = [t for t in walk(*source.parts[:2], into=lambda t: t.called != "tobytes") if t.called == "tobytes"]
    if not packed:
        return names_validation(*source.parts)
    return any(one.receiver is not None and is_validation(one.receiver, streams) for one in packed)


_DIGITS = frozenset(("-", "//", "%", ">>", "<<", "&", "|", "^"))
_AT_PLACES = frozenset((".index_put_", ".index_add_", ".index_copy_", ".index_fill_", ".put_"))


def cut_from(term: Term, streams: Streams) -> Term:
    """Where stored tokens were cut out of their stream, below what packs them; the term itself where all are stored."""
    waiting, seen = [term], set[int]()
    while waiting and len(seen) < 400:
        one = waiting.pop()
        if id(one) in seen or not is_validation(one, streams):
            continue
        seen.add(id(one))
        if one.op == "item" and one.parts[1].op == "slice" and streams.is_stream(one.parts[0]):
            low, high = (part.constant() for part in one.parts[1].parts[:2])
            if isinstance(high, int) and high > 1 and not low:
                return one
        waiting.extend(one.parts)
    return term


def stored(root: Term) -> Iterator[Term]:
    """What is kept as it is in something that is written: through containers, packing and compression."""
    waiting, seen = [root], set[int]()
    while waiting and len(seen) < 3000:
        term = waiting.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        yield term
        below = peel(term)
        if below is not term:
            waiting.append(below)
        elif term.op in ("dict", "list", "tuple", "set", "merge", "text", "each", "round"):
            waiting.extend(term.parts)
        elif term.op == "choice":
            waiting.extend(term.parts[1:])
        elif term.op == "store":
            waiting.extend((term.parts[0], term.parts[2]))
        elif term.op == "mutate" and term.value in _AT_PLACES:  # the places that are filled are not kept
            waiting.extend((term.parts[0], *(part for part in term.parts[2:] if part.op != "const")))
        elif term.op == "mutate" or (term.op == "op" and term.value in ("+", "|")):
            waiting.extend(term.parts)
        elif term.op == "op" and term.value in _DIGITS and any(part.op == "const" for part in term.parts):
            waiting.extend(term.parts)  # high and low bytes of an id
        elif (term.called in ("min", "max") and "key" in term.keys) or term.op == "item":  # the shorter of two packings
            waiting.append(term.parts[0])
        elif term.op == "call" and (term.called in _PACKERS or "ompress" in term.called):
            waiting.extend(part for part in term.parts if part.op != "name")
        elif term.op == "object":
            waiting.extend(term.value.attrs.values())


_SUMMARIES = frozenset("item mean sum len max min numel format str join median count_nonzero any all".split())  # noqa: SIM905
_TALLIES = frozenset(("bincount", "unique", "unique_consecutive", "histogram", "histc", "Counter"))


def counted(root: Term, streams: Streams) -> Iterator[Term]:
    """Tokens of the validation files at whose numbers a table was filled that reaches what is written: where they were
    taken; not what was worked out of a loss, and not what a line of a log tells of a table."""

    def within(term: Term) -> bool:
        told = term.op == "text" or term.called in _SUMMARIES
        return not (told or is_loss(term) or streams.is_stream(term))

    for count, term in enumerate(walk(root, into=within)):
        if count > 3000:
            return
        if term.called in _TALLIES and is_validation(term.operand("a", "ar", "iterable") or term, streams):
            yield term
        placed = term.op == "mutate" and term.value in (".index_put_", ".scatter_add_", ".index_add_", ".put_")
        for place in term.parts[1:2] if placed or term.op == "store" else ():
            for one in place.parts if place.op == "tuple" else (place,):
                if is_validation(one, streams):
                    cuts = [cut for cut in streams.chain(one).values() if cut.op == "item"]
                    yield cuts[-1] if cuts else one


def writes(program: Program) -> Iterator[tuple[Event, Term, Term]]:
    """(event, what is written, where to): of write, dump, save and the like."""
    for event in program.called(*_WRITERS):
        term = event.term
        arguments = [part for part, key in zip(term.parts, term.keys, strict=True) if key != "self"]
        if not arguments:
            continue
        what, where = arguments[0], term.receiver
        if term.called == "tofile" and term.receiver is not None:
            what, where = term.receiver, arguments[0]
        elif where is None or term.value in ("numpy.save", "numpy.savez"):
            where = arguments[1] if len(arguments) > 1 else arguments[0]
            if term.value in ("numpy.save", "numpy.savez", "numpy.savez_compressed"):
                what, where = (arguments[1] if len(arguments) > 1 else arguments[0]), arguments[0]
        yield event, what, where


def tokenised(program: Program) -> list[tuple[Term, Term]]:
    """(call, text) of every cutting of a text into tokens; not the encoding of a text as bytes."""
    found = []
    for event in program.events:
        term = event.term
        if term.called in TOKENISERS and term.receiver is not None:
            text = term.argument(0, "input", "text")
        elif term.value == "()" and term.parts[0].op == "attr" and term.parts[0].value in TOKENISERS:
            text = term.parts[1] if len(term.parts) > 1 else None
        else:
            continue
        if text is not None and text.constant() not in _CODECS:
            found.append((term, text))
    return found


def spells_capital(term: Term) -> bool:
    """`"^" + letter.lower()`: whatever the sign is, it stands for a capital, and its bytes are in no original."""
    if term.op != "op" or term.value != "+" or len(term.parts) != 2:
        return False
    sign, letter = term.parts[0].constant(), term.parts[1]
    marked = isinstance(sign, str) and bool(sign) and not sign.isspace() and len(sign) <= _MARK
    return marked and letter.op == "call" and letter.called in ("lower", "casefold")


_MARK = 8  # characters of a mark, "<cap>"
