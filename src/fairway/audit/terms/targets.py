"""Where a loss reads the token that it scores.

A loss may read its target in one way only: as the place in a distribution that was finished without it (the target of
cross entropy, the index of a gather), or compared with a hint. `Target.kinds` says how a term reads it:

    score    at that place of a distribution: a loss, a probability of the target
    match    compared for equality: hint == target, target != padding
    key      as part of the key of a memory, beside the context
    read     in any other way: looked up in a table, compared in size, computed with
"""

from collections.abc import Iterator
from functools import cached_property

from fairway.audit.terms.choices import is_mask
from fairway.audit.terms.octets import looked_up
from fairway.audit.terms.positions import Place, place_of_tokens, runs
from fairway.audit.terms.streams import (
    Streams,
    compared,
    only_reshapes,
    reads,
    reads_of_memory,
    tells_no_token,
    token_terms,
)
from fairway.audit.terms.term import Below, Term, any_below, peel, same
from fairway.audit.terms.totals import GATHERS, LOSSES, is_learned, summed, unlearned

_DISTRIBUTIONS = frozenset(
    """softmax log_softmax exp exp2 sigmoid linear matmul logsumexp () forward logits einsum tanh log""".split()  # noqa: SIM905
)


class Contribution:
    """One term that the score sums, with the target that it scores."""

    def __init__(self, term: Term, streams: Streams) -> None:
        self.term = term
        self.streams = streams
        self.found: dict[int, tuple[Term, frozenset[str]]] = {}
        self.wide: dict[int, tuple[Term, bool]] = {}
        self.bases: list[Term] = []  # of what is read at a target
        self.targets = list(self._targets()) or list(self._ranked())
        # Of `for p, tok in zip(rows, y.tolist())` all of y: tables that are looked up by it know what is scored.
        # So do those that are looked up by all that a loss goes through in blocks, `y.reshape(-1)[a:b]`.
        self.targets += [whole for one in self.targets if one.op == "each" and (whole := self._gone_through(one))]
        self.targets += [whole for one in self.targets if (whole := _in_blocks(one)) is not None]
        self.own = self._own()
        self.aligned = self._aligned()

    # ---- what the target is

    def _targets(self) -> Iterator[Term]:
        """Token ids that a distribution is read at, and those that follow the context that is read beside them."""
        at: list[tuple[Term, Term]] = []  # (what is read at a place, the place's token ids)
        waiting, done = [self.term], set[int]()
        while waiting and len(done) < 20_000:
            term = waiting.pop()
            if id(term) in done:
                continue
            done.add(id(term))
            place = self.scored_place(term)
            found = [one for one in _members(place) if self.streams.is_stream(one)] if place is not None else []
            if place is not None and place.op == "tuple":  # rows[context, target], losses[positions, target]
                found = found[-1:]
            if found:  # what the distribution itself was looked up by, further down, is its context
                at.extend((term, one) for one in found if not _is_past(one))
                self.bases.extend(part for part in term.parts if part is not place)
            else:
                waiting.extend(reads(term, self.streams))
        yield from self._apart_from_context(list(self._outermost(at, self.bases)))
        seen = [peel(one) for one in token_terms(self.term, self.streams)]
        ends = [_end(one) for one in seen]
        for one in seen:
            if one.op == "item" and one.parts[1].op != "slice":
                for base, end in filter(None, ends):
                    if base is one.parts[0] and same(end, one.parts[1], 6):
                        yield one

    def _apart_from_context(self, found: list[Term]) -> list[Term]:
        """Those that are not picked out of what the model is given, as a hint is, `ids.gather(1, seen + 1)`; all, where
        each is: `model(x)[:, :-1]` at x[:, 1:]."""
        if len(found) < 2:
            return found
        context = {id(one) for base in self.bases for one in token_terms(base, self.streams)}
        apart = [one for one in found if not any(part in context for part in self.streams.chain(one))]
        return apart or found

    def _gone_through(self, one: Term) -> Term | None:
        whole = peel(one.parts[0])
        return whole if whole.op == "item" and self.streams.is_stream(whole) else None

    def _outermost(self, at: list[tuple[Term, Term]], bases: list[Term]) -> Iterator[Term]:
        """Those that no other distribution is made from: an entropy that decides something leads into the model beside
        the loss, and down there its tables are looked up by the context."""
        inner = {id(term) for term in self.below(*bases)}
        outer = [one for term, one in at if id(term) not in inner]
        yield from outer or (one for _, one in at)

    def _ranked(self) -> Iterator[Term]:
        """Token ids that are looked for among the likeliest, where no distribution is read at a place."""
        for term in self.below(self.term):
            equals = (term.op == "compare" and term.value == "==") or term.called == "eq"
            if equals and len(term.parts) >= 2:
                for one, other in (term.parts[:2], term.parts[1::-1]):
                    if self.streams.is_stream(one) and any_below(other, lambda t: t.called == "topk"):
                        yield from (member for member in _members(one) if self.streams.is_stream(member))

    def below(self, *roots: Term) -> Iterator[Term]:
        """All that values read, each term once."""
        waiting = list(roots)
        seen: set[int] = set()
        while waiting and len(seen) < 20_000:
            term = waiting.pop()
            if id(term) not in seen:
                seen.add(id(term))
                yield term
                waiting.extend(reads(term, self.streams))

    def scored_place(self, term: Term) -> Term | None:
        """The place that a distribution is read at: of cross entropy, of a gather, of an index."""
        if term.op == "call" and term.called in LOSSES:
            return term.at(1, "target", "labels")
        if term.op == "call" and term.called in GATHERS:
            base, place = looked_up(term), _index_of(term)
            return place if base is not None and place is not None and self.is_distribution(base) else None
        if term.op == "item" and self.is_distribution(term.parts[0]):
            return None if _tells_padding(term.parts[1]) else term.parts[1]
        if term.op == "call" and term.value == "()" and len(term.parts) >= 3:  # model(x, y): a loss
            streams = [part for part in term.parts[1:] if self.streams.is_stream(part)]
            return streams[1] if len(streams) == 2 else None
        return None

    def is_distribution(self, base: Term) -> bool:
        """Whether something over the vocabulary is read: made by a softmax and the like, a row of a memory, or what is
        divided by its own sum."""
        if id(base) not in self.wide:
            if self.streams.is_stream(base):
                self.wide[id(base)] = (base, False)
            else:
                learned_apart = not is_learned(base) and _made_by_a_model(base)
                made = learned_apart and self.streams.from_tokens(base)
                row = self.streams.is_memory(base) and bool(reads_of_memory(base))
                self.wide[id(base)] = (base, made or row or _is_divided_by_its_sum(base))
        return self.wide[id(base)][1]

    def _own(self) -> dict[int, Term]:
        """What the targets were cut from and the context was not."""
        chains: dict[int, Term] = {}
        for target in self.targets:
            chains.update(self.streams.chain(target))
        context: dict[int, Term] = {}
        # What a row that counts were added to began as is not read at a place of it, and has its context all the same.
        for term in (one for root in (self.term, *self.bases) for one in token_terms(root, self.streams)):
            if id(term) in chains or any(same(term, target, 10) for target in self.targets):
                continue
            if not any(id(target) in self.streams.chain(term) for target in self.targets):
                context.update(self.streams.chain(term))
        return {key: term for key, term in chains.items() if key not in context}

    def _aligned(self) -> set[int]:
        """Whole streams that the target is a slice of, where something computed beside them, position by position, is
        cut at the same place: hints[a:b] beside tokens[a:b]."""
        cuts = [term for term in self.own.values() if term.op == "item"]
        found: set[int] = set()
        for term in self.below(self.term) if cuts else ():
            if term.op == "item" and not self.streams.is_stream(term):
                found.update(id(cut.parts[0]) for cut in cuts if same(cut.parts[1], term.parts[1], 8))
        return found - {id(term) for term in self.own.values()}

    def is_target(self, term: Term) -> bool:
        if id(term) in self.own:
            return True
        if not self.streams.is_stream(term):
            return False
        bare = _unwidened(term)
        return any(same(bare, target, 10) for target in self.bare_targets) or self._beside(term)

    def _beside(self, term: Term) -> bool:
        """tokens[t + 1] in a loop that begins where the targets tokens[a + 1 : b + 1] begin; rows[i, a:b][1:] of the
        targets rows[i, a + 1 : b]."""
        if not runs(term) and not (term.op == "item" and term.parts[1].op == "slice"):
            return False
        here = place_of_tokens(term)
        return here is not None and any(here.meets(place) for place in self.places)

    @cached_property
    def bare_targets(self) -> list[Term]:
        """The targets without axes of length one."""
        return [_unwidened(target) for target in self.targets]

    @cached_property
    def places(self) -> list[Place]:
        """Where the targets begin in their streams."""
        return [place for target in self.targets if (place := place_of_tokens(target)) is not None]

    # ---- how a term reads it

    def kinds(self, term: Term) -> frozenset[str]:
        if id(term) not in self.found:
            self.found[id(term)] = (term, frozenset())  # a circle adds nothing
            self.found[id(term)] = (term, self._kinds(term))
        return self.found[id(term)][1]

    def _kinds(self, term: Term) -> frozenset[str]:
        if self.is_target(term):
            return frozenset(("read",))
        if term.op == "item" and tells_no_token(term.parts[1], self.streams):
            return self.kinds(term.parts[0])
        if is_gradient(term) or self._at_other_places(term):  # of which token, the rules of the order say
            return frozenset()
        if _is_past(term) or (term.op == "item" and id(term.parts[0]) in self.aligned):
            return frozenset()
        if id(term) in self.aligned:
            return frozenset(("read",))
        place = self.scored_place(term)
        if place is not None and any(self.is_target(one) for one in _members(place)):
            rest = [part for part in term.parts if part is not place]
            return frozenset(("score",)).union(*(self.kinds(part) for part in rest))
        if term.op == "compare" and term.value in ("==", "!="):
            return self._matched(term.parts)
        if term.op == "compare" and term.value in ("in", "not in", "is", "is not"):
            return self._matched(compared(term, self.streams))
        if term.op == "call" and term.called in ("eq", "ne", "isin", "in1d", "equal") and len(term.parts) >= 2:
            return self._matched(term.parts)
        key = self._key(term)
        if key is not None:
            read = frozenset().union(*(self.kinds(part) for part in key))
            return frozenset(("key",)) | (read - {"read"}) if "read" in read else read
        return frozenset().union(*(self.kinds(part) for part in reads(term, self.streams)))

    def _at_other_places(self, term: Term) -> bool:
        """y[places < edge]: targets of some places, where no losses are picked by the same mask."""
        if term.op != "item" or not is_mask(term.parts[1]) or not self.streams.is_stream(term.parts[0]):
            return False
        if self.kinds(term.parts[1]):
            return False
        mine = [base for base, mask in self.masked if same(mask, term.parts[1], 8)]
        return not any("score" in self.kinds(base) for base in mine)

    @cached_property
    def masked(self) -> list[tuple[Term, Term]]:
        """(what is picked from, mask) of all that is picked by a mask and is no token."""
        picked = (term for term in self.below(self.term) if term.op == "item" and is_mask(term.parts[1]))
        return [(term.parts[0], term.parts[1]) for term in picked if not self.streams.is_stream(term.parts[0])]

    def _matched(self, parts: tuple[Term, ...]) -> frozenset[str]:
        kinds = [self.kinds(part) for part in parts]
        reading = [part for part, one in zip(parts, kinds, strict=True) if "read" in one]
        if len(reading) == 1 and self._reads_now(reading[0]):
            return frozenset(("match",)).union(*(one - {"read"} for one in kinds))
        return frozenset().union(*kinds)

    def _reads_now(self, root: Term) -> bool:
        """Whether the target is read otherwise than through what a table has learned: what two predictions agree on is
        no match with it."""
        return any(self.is_target(term) for term in unlearned(root, lambda term: reads(term, self.streams)))

    def _key(self, term: Term) -> tuple[Term, ...] | None:
        """The key of a lookup that takes the target together with its context."""
        if term.op == "item":
            base, key = term.parts
        elif term.op == "call" and term.called == "get" and term.receiver is not None and len(term.parts) > 1:
            base, key = term.receiver, term.parts[1]
        else:
            return None
        if self.streams.is_memory(base) or (not self.streams.is_stream(base) and self._mixed(key)):
            return (key, *reads_of_memory(base))
        return None

    def _mixed(self, key: Term) -> bool:
        """A key of several tokens, not one token's number."""
        return len({id(peel(one)) for one in token_terms(key, self.streams)}) > 1


def _in_blocks(target: Term) -> Term | None:
    """y, of y.reshape(-1)[a:b] where a loop goes through its places from the first on."""
    index = target.parts[1] if target.op == "item" else None
    cut = index.parts[0] if index is not None and index.op == "tuple" and index.parts else index
    if cut is None or cut.op != "slice":
        return None
    first, flat = cut.parts[0], target.parts[0]
    turns = first.parts[0] if first.op == "each" and first.parts else None
    begun = turns.argument(0) if turns is not None and turns.called == "range" else None
    whole = peel(flat)
    return whole if begun is not None and begun.constant() == 0 and whole is not flat else None


def is_gradient(term: Term) -> bool:
    return (term.op == "call" and term.called in ("grad", "vjp", "jacrev")) or (
        term.op == "attr" and term.value == "grad"
    )


def _makes_distribution(term: Term) -> bool:
    return (term.op == "call" and term.called in _DISTRIBUTIONS) or (term.op == "op" and term.value in ("/", "@"))


_made_by_a_model = Below(_makes_distribution, into=lambda term: not is_learned(term))


def _is_divided_by_its_sum(term: Term) -> bool:
    """prior / prior.sum()"""
    share = peel(term)
    if share.op != "op" or share.value != "/":
        return False
    above, below = (peel(part) for part in share.parts)
    whole = below.operand("a", "input") if below.called == "sum" else None
    return whole is not None and same(peel(whole), above, 8)


def _tells_padding(index: Term) -> bool:
    """nll[y != -100]: a mask of what is held against a constant picks losses, and reads no distribution at a place."""
    below = peel(index)
    return below.op == "compare" and any(part.constant() is not None for part in below.parts)


def _index_of(term: Term) -> Term | None:
    if term.receiver is not None:
        return term.argument("index", "indices", 1) if term.called != "take_along_axis" else term.argument(0)
    if term.called == "take_along_axis":
        return term.argument(1, "indices")
    return term.argument("index", "indices", 2) or term.argument(1)


def _members(place: Term) -> Iterator[Term]:
    """The parts of an index: all of a tuple, else itself, beneath changes of shape."""
    for one in place.parts if place.op in ("tuple", "list") else (place,):
        below = peel(one)
        yield one
        if below is not one:
            yield below
        if below.op == "item" and only_reshapes(below.parts[1]):  # y[:, None], y[..., None]
            yield below.parts[0]


def _unwidened(term: Term) -> Term:
    """rows[:, 1:] for rows[:, 1:, None]: the same tokens without an axis of length one."""
    below = peel(term)
    if below.op != "item" or below.parts[1].op != "tuple":
        return term
    base, index = below.parts
    kept = tuple(part for part in index.parts if not (part.op == "const" and part.value is None))
    if len(kept) == len(index.parts) or len(kept) < 2:
        return term
    return Term("item", (base, Term("tuple", kept, None, index.file, index.line)), None, below.file, below.line)


def _end(term: Term) -> tuple[Term, Term] | None:
    """(base, end) of base[a:end]."""
    if term.op == "item" and term.parts[1].op == "slice" and len(term.parts[1].parts) == 3:
        end = term.parts[1].parts[1]
        return (term.parts[0], end) if end.op != "const" else None
    return None


def _is_past(term: Term) -> bool:
    """y[:-1]: all but the last, which is what comes before each target."""
    term = peel(term)
    if term.op != "item":
        return False
    index = term.parts[1]
    last = index.parts[-1] if index.op == "tuple" and index.parts else index
    if last.op != "slice" or len(last.parts) != 3:
        return False
    low, high = last.parts[0].constant(), last.parts[1].constant()
    return low in (None, 0) and isinstance(high, int) and high < 0


def contributions(root: Term, streams: Streams, limit: int = 24) -> list[Contribution]:
    """The terms that a sum adds, the latest round of each line first met."""
    found: list[Term] = []
    lines: set[tuple[str, int, str]] = set()
    waiting, seen = [root], set()
    while waiting and len(found) < limit:
        term = waiting.pop(0)
        if id(term) in seen:
            continue
        seen.add(id(term))
        inner = summed(term)
        if inner is not None:
            waiting.extend(inner)
            continue
        made = peel(term.parts[0]) if term.op == "item" else term  # sums[2] of torch.zeros(3) is nought as well
        if term.op == "const" or (made.op == "call" and made.called.startswith(("zeros", "empty"))):
            continue
        key = (term.file, term.line, f"{term.op} {term.value}")
        if key not in lines:
            lines.add(key)
            found.append(term)
    return [Contribution(term, streams) for term in found]
