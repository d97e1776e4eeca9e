"""Token ids as they come from a file: slices, buffers filled from slices, batches; and tables that tokens are looked
up in."""

from collections.abc import Iterator

from fairway.audit.terms.choices import is_mask
from fairway.audit.terms.octets import PIECES, looked_up
from fairway.audit.terms.term import Term, any_below, layers, peel

_SOURCES = frozenset(
    """fromfile memmap frombuffer load read encode EncodeAsIds encode_as_ids read_table load_dataset open_memmap
    from_file unpack readinto readinto1""".split()  # noqa: SIM905
)
_CARRIERS = frozenset(
    """cat concatenate concat stack vstack hstack pad roll chunk split unbind unfold narrow select pin_memory
    where clamp clamp_min clip masked_fill as_strided sliding_window_view tile repeat pop popleft next get
    remainder minimum maximum abs flip diff islice DataLoader""".split()  # noqa: SIM905
)
_LOOKUPS = frozenset(("index_select", "take", "gather"))
_STORED = 3  # parts: where, under what, what
_KEYED = frozenset(("dict", "defaultdict", "Counter", "OrderedDict", "set"))


class Streams:
    """Answers, each computed once: is a term token ids; from which terms were they cut; is a container a memory."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Term, bool]] = {}
        self.chains: dict[int, tuple[Term, dict[int, Term]]] = {}
        self.tokens: dict[int, tuple[Term, bool]] = {}
        self.memories: dict[int, tuple[Term, bool]] = {}
        self.validation: dict[int, tuple[Term, bool]] = {}  # of reads of files: whether they name that split

    def is_stream(self, term: Term) -> bool:
        """Token ids of a file: nothing but cutting, shaping and buffering stands between."""
        return self._is(term, 0)

    def _is(self, term: Term, depth: int) -> bool:
        if id(term) in self.known:
            return self.known[id(term)][1]
        if depth > 150:
            return False
        self.known[id(term)] = (term, False)
        found = self._found(term, depth)
        self.known[id(term)] = (term, found)
        return found

    def _found(self, term: Term, depth: int) -> bool:
        if term.op == "call" and term.called in _SOURCES and not _is_text_coding(term):
            return not _is_counter(term)
        if term.op == "item" or (term.op == "call" and (term.called in _LOOKUPS or term.called == "get")):
            base = looked_up(term) if term.called != "get" else term.receiver
            if base is None or self.is_memory(base):
                return term.op == "item" and self._is_shelf(term.parts[0], depth)
            place = term.parts[1] if term.op == "item" else None
            return self._is(base, depth + 1) and (place is None or not self.is_key(place))
        return any(self._is(part, depth + 1) for part in carried(term))

    def _is_shelf(self, held: Term, depth: int) -> bool:
        """Whether a dict only holds what was read from files, by their names: `if path not in maps: maps[path] =
        np.memmap(path)`."""
        stores = [one for one in layers(held) if one.op == "store" and len(one.parts) == _STORED]
        return bool(stores) and all(
            not self.from_tokens(one.parts[1]) and self._is(one.parts[2], depth + 1) for one in stores
        )

    def chain(self, term: Term) -> dict[int, Term]:
        """The terms that token ids were cut from, themselves among them, by id."""
        if id(term) not in self.chains:
            found: dict[int, Term] = {}
            waiting = [term]
            while waiting and len(found) < 4000:
                one = waiting.pop()
                if id(one) in found or not self.is_stream(one):
                    continue
                found[id(one)] = one
                base = looked_up(one) if one.called in _LOOKUPS else None
                waiting.extend((base,) if base is not None else one.parts[:1] if one.op == "item" else carried(one))
            self.chains[id(term)] = (term, found)
        return self.chains[id(term)][1]

    def is_key(self, index: Term) -> bool:
        """Whether an index looks something up by token ids: not a slice (that is a place), not a mask."""
        members = index.parts if index.op == "tuple" else (index,)
        return any(one.op != "slice" and not is_mask(one) and self.from_tokens(one) for one in members)

    def from_tokens(self, place: Term) -> bool:
        """Whether an index is made of token ids and not of positions."""
        if id(place) not in self.tokens:
            self.tokens[id(place)] = (place, False)
            self.tokens[id(place)] = (place, self._from_tokens(place))
        return self.tokens[id(place)][1]

    def _from_tokens(self, place: Term) -> bool:
        waiting = [place]
        seen: set[int] = set()
        while waiting:
            term = waiting.pop()
            if id(term) in seen:
                continue
            seen.add(id(term))
            if self.is_stream(term):
                return True
            if len(seen) > 600:
                return False
            picked = term.op == "item" and is_mask(term.parts[1])  # some of the positions are positions
            again = term.called in ("repeat", "repeat_interleave")  # so are positions, however often each stands there
            waiting.extend(term.parts[:1] if picked or again else reads(term, self))
        return False

    def is_memory(self, base: Term) -> bool:
        """A container keyed by tokens: what it answers depends on the key, and on what was stored before."""
        if id(base) not in self.memories:
            self.memories[id(base)] = (base, False)
            self.memories[id(base)] = (base, self._is_memory(base))
        return self.memories[id(base)][1]

    def _is_memory(self, base: Term) -> bool:
        waiting: list[Term] = [peel(base)]
        seen: set[int] = set()
        while waiting and len(seen) < 80:
            term = peel(waiting.pop())
            if id(term) in seen:
                continue
            seen.add(id(term))
            if term.op == "store" and self.is_key(term.parts[1]):
                return True
            filled = term.op == "mutate" and term.value in (".index_put_", ".put_", ".index_fill_", ".__setitem__")
            if filled and any(self.from_tokens(part) for part in term.parts[1:]):
                return True
            if term.op == "call" and (term.called in _KEYED or term.called in ("bincount", "unique", "histogram")):
                return True
            if term.op in ("dict", "set") and term.value != "comp" and not term.parts:
                return True
            if term.op == "item":
                waiting.extend(_held_tables(term.parts[0]))
            if term.op in ("store", "mutate", "item"):
                waiting.append(term.parts[0])
            elif term.op in ("choice", "merge", "each", "round"):
                waiting.extend(term.parts[1:] if term.op == "choice" else term.parts)
            elif term.op == "op" and term.value in ("+", "-", "*", "/"):
                waiting.extend(term.parts)
            elif term.op == "call" and term.called in ("get", "setdefault") and term.receiver is not None:
                waiting.append(term.receiver)
        return False


def _held_tables(container: Term) -> list[Term]:
    """The tables that were put back into a dict or a list of tables after they were filled: tables[order]."""
    layered = layers(container)
    if not any(one.op in ("dict", "list") and one.parts for one in layered):
        return []
    return [one.parts[2] for one in layered if one.op == "store"]


def _is_text_coding(term: Term) -> bool:
    """text.encode("utf-8") makes bytes; a tokenizer's encode(text) makes token ids."""
    if term.called != "encode":
        return False
    given = [part for part, key in zip(term.parts, term.keys, strict=True) if key != "self"]
    return not given or isinstance(given[0].constant(), str)


def _is_counter(term: Term) -> bool:
    """Numbers of a file that is read to be written again, open(path, "r+b"), or one that is unpacked: what ranks have
    claimed so far is no text."""
    said = term.parts[0].constant() if term.called == "unpack" and term.parts else None
    if isinstance(said, str):
        return len(said.lstrip("<>=!@")) == 1
    opened = peel(term.receiver) if term.called == "read" and term.receiver is not None else None
    if opened is None or opened.called != "open":
        return False
    modes = [part.constant() for part in opened.parts]
    return any(isinstance(mode, str) and "+" in mode and len(mode) <= 3 for mode in modes)


def carried(term: Term) -> tuple[Term, ...]:
    """The parts whose token ids a term passes on."""
    below = peel(term)
    if below is not term:
        return (below,)
    if term.op == "choice":
        return term.parts[1:]
    if term.op in ("merge", "each", "round", "tuple", "list"):
        return term.parts
    if term.op == "store":
        return (term.parts[0], term.parts[2])
    if term.op == "mutate" and term.value in _PLACED:  # the places that are written to are no part of it
        return (term.parts[0], term.parts[-1])
    if term.op == "mutate" and term.value == ".index_put_":
        return (term.parts[0], *term.parts[2:3])
    if term.op == "mutate":
        return term.parts
    if term.op == "attr" and term.value in ("T", "data", "values", "flat"):
        return term.parts
    if term.op == "call" and term.called == "split" and any(isinstance(p.constant(), str) for p in term.parts):
        return ()  # a text's lines or words
    if term.op == "call" and term.called in _CARRIERS:
        return term.parts
    if term.op == "op" and term.value == "+" and all(part.op == "item" or _is_list(part) for part in term.parts):
        return term.parts
    return ()


def _is_list(term: Term, depth: int = 6) -> bool:
    """A list that is written out, or what such lists were added to: `ids += [start, *more]`."""
    if term.op in ("merge", "choice") and depth:  # what a circle leads back to says nothing
        parts = term.parts[1:] if term.op == "choice" else term.parts
        return any(_is_list(part, depth - 1) for part in parts)
    if term.op == "op" and term.value == "+" and depth:
        return any(_is_list(part, depth - 1) for part in term.parts)
    return term.op in ("list", "tuple")


_PLACED = frozenset((".put_", ".index_fill_", ".index_copy_", ".scatter_", ".masked_scatter_", ".masked_fill_"))

_MEASURES = frozenset(
    """len numel size dim nelement range arange is_tensor isinstance empty_like
    nonzero flatnonzero argwhere searchsorted argsort cumsum count_nonzero""".split()  # noqa: SIM905
)
"""Sizes, and positions: where a document starts is no token."""


def only_reshapes(index: Term) -> bool:
    """[..., None], [:, None]: an index that cuts nothing away."""
    return all(
        (part.op == "const" and part.value in (None, ...))
        or (part.op == "slice" and all(p.op == "const" and p.value is None for p in part.parts))
        for part in (index.parts if index.op == "tuple" else (index,))
    )


def reads(term: Term, streams: Streams) -> tuple[Term, ...]:
    """What a value depends on: of a memory the key alone, of a measure nothing, of an object nothing."""
    if term.op == "item" and only_reshapes(term.parts[1]) and peel(term.parts[0]).op == "op":
        return term.parts[:1]  # (boost * share)[:, None]: whatever memory its parts came out of, nothing is looked up
    if term.op == "item" and tells_no_token(term.parts[1], streams):
        return term.parts[:1]
    if term.op == "item" and streams.is_memory(term.parts[0]):
        inner = term.parts[0]
        return (*reads_of_memory(inner), term.parts[1])
    if term.op == "store" and streams.is_key(term.parts[1]):  # read as a whole: what was entered, the order's rules say
        return term.parts[:1]
    if term.op == "call" and term.called in ("get", "setdefault", "pop") and term.receiver is not None:
        return term.parts[1:] if streams.is_memory(term.receiver) else term.parts
    if term.op == "call" and term.called == "len" and any_below(term, _is_text):
        return term.parts  # the length of a token's text tells the token
    if term.op == "call" and (term.called in _MEASURES or term.called.endswith(("_like",))):
        return ()
    if term.op == "call" and term.called == "where" and len(term.parts) == 1:  # the positions where it holds
        return ()
    if term.op == "attr" and term.value in ("shape", "device", "dtype", "ndim", "is_cuda"):
        return ()
    if term.op == "compare" and term.value in ("in", "not in", "is", "is not"):
        return compared(term, streams)
    if term.op == "item" and _is_number(term):
        return ()
    return term.parts


def tells_no_token(index: Term, streams: Streams) -> bool:
    """logits[y >= 0], logits[y != -100]: where a token stands at all, which is none of its own. Not of losses, whose
    sign may say which of two is the smaller."""
    below = peel(index)
    if below.op != "compare" or below.value not in ("!=", ">", ">=") or not streams.is_stream(below.parts[0]):
        return False
    number = below.parts[1].constant()
    return type(number) is int and (number < 0 or (number == 0 and below.value == ">="))


def compared(term: Term, streams: Streams) -> tuple[Term, ...]:
    """What `x in container` and `x is None` read: of a table its keys and not what it holds, of a value that may be
    missing the conditions under which it was made."""
    left, right = term.parts
    if term.value in ("in", "not in"):
        if streams.is_memory(right):
            return (left,)
        keys = _keys(right)
        return term.parts if keys is None else (left, *keys)
    if right.op == "const" and right.value is None:
        return _presence(left)
    return term.parts


def _keys(container: Term) -> tuple[Term, ...] | None:
    """The keys of a table with named entries; None for what is no such table."""
    found: list[Term] = []
    waiting, seen, named = [container], set[int](), False
    while waiting and len(seen) < 400:
        term = waiting.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        if term.op in ("merge", "choice"):
            waiting.extend(term.parts[1:] if term.op == "choice" else term.parts)
        elif term.op == "store":
            named = True
            found.append(term.parts[1])
            waiting.append(term.parts[0])
        elif term.op == "dict" and term.value != "comp":
            named = True
            found.extend(term.parts[::2])
        elif term.op == "mutate":
            waiting.append(term.parts[0])
        elif term.op in ("list", "tuple", "set"):
            return None
    return tuple(found) if named else None


def _presence(value: Term) -> tuple[Term, ...]:
    """What decides whether a value is there at all."""
    found: list[Term] = []
    waiting, seen = [value], set[int]()
    while waiting and len(seen) < 400:
        term = waiting.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        if term.op == "choice":
            found.append(term.parts[0])
            waiting.extend(term.parts[1:])
        elif term.op == "merge":
            waiting.extend(term.parts)
        elif term.op == "item" or (term.op == "call" and term.called in ("get", "pop", "setdefault", "next")):
            found.append(term)
    return tuple(found)


def _is_number(term: Term) -> bool:
    """The number of a round: the first of each pair that enumerate gives."""
    base, place = term.parts
    while base.op == "round":
        base = base.parts[0]
    counted = base.op == "each" and base.parts[0].op == "call" and base.parts[0].called == "enumerate"
    return counted and place.op == "const" and place.value == 0


def _is_text(term: Term) -> bool:
    return term.op == "call" and (term.called in ("encode", "bytes", "decode", "Decode") or term.called in PIECES)


def reads_of_memory(base: Term) -> tuple[Term, ...]:
    """The keys that led to a row inside a memory: table[context][token] reads the context, too."""
    found: list[Term] = []
    waiting, steps = [peel(base)], 0
    while waiting and steps < 40:
        term = peel(waiting.pop())
        steps += 1
        if term.op == "item":
            found.append(term.parts[1])
            waiting.append(term.parts[0])
        elif term.op in ("choice", "merge"):
            waiting.extend(term.parts[1:] if term.op == "choice" else term.parts)
        elif term.op == "call" and term.called in ("get", "setdefault") and len(term.parts) > 1:
            found.append(term.parts[1])
    return tuple(found)


def token_terms(root: Term, streams: Streams, limit: int = 4000) -> Iterator[Term]:
    """The token ids that a value reads, each as it is used (not what it was cut from)."""
    waiting = [root]
    seen: set[int] = set()
    while waiting and len(seen) < limit:
        term = waiting.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        if streams.is_stream(term):
            yield term
        else:
            waiting.extend(reads(term, streams))
