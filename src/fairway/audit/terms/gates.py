"""What a contribution to the score does with its target, beyond reading a finished distribution at it."""

from collections.abc import Callable, Iterator
from functools import cached_property

from fairway.audit.terms.choices import carried, chooses, forked, is_mask, is_nothing, is_product, options, picks
from fairway.audit.terms.octets import looked_up
from fairway.audit.terms.streams import only_reshapes, reads, token_terms
from fairway.audit.terms.targets import Contribution
from fairway.audit.terms.term import Below, Term, peel, same
from fairway.audit.terms.totals import GATHERS, unlearned

_LOGS = frozenset(("log", "log2", "log1p", "logaddexp", "logsumexp", "log_", "logaddexp2"))
_CHECKS = frozenset(("isfinite", "isnan", "isinf", "is_tensor"))
_SIZES = frozenset(("lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal"))
_RAISED = frozenset(("scatter_add", "scatter_add_", "scatter", "scatter_", "index_add", "index_add_", "scatter_reduce"))
_MODELS = frozenset(("softmax", "log_softmax", "linear", "matmul", "mm", "addmm", "bmm", "einsum", "()", "forward"))
_SMALLEST = frozenset(("minimum", "maximum", "fmin", "fmax", "min", "max", "amin", "amax", "nanmin", "nanmax"))


class Gates:
    """The questions of the distribution rules about one contribution. settled: whether a term is a choice by what came
    before the target, so that nothing it was made of reads that now."""

    def __init__(self, contribution: Contribution, settled: Callable[[Term], bool] = lambda term: False) -> None:
        self.of = contribution
        self.settled = settled
        self.kinds = contribution.kinds
        self._now: dict[int, tuple[Term, bool]] = {}

    @cached_property
    def nodes(self) -> list[Term]:
        return list(self.of.below(self.of.term))

    @cached_property
    def present(self) -> list[Term]:
        """The nodes that are reached otherwise than through what a state has learned."""
        return list(self.without_learning(self.of.term))

    @cached_property
    def inside(self) -> set[int]:
        """Terms that a logarithm, or the place of a distribution, is taken of."""
        roots: list[Term] = []
        for term in self.nodes:
            place = self.of.scored_place(term)
            if (place is not None and self.kinds(place)) or term.called in _LOGS:
                roots.extend(part for part in term.parts if part is not place)
        return {id(below) for below in self.of.below(*roots)}

    # ---- the better of two, known by the answer

    def oracles(self) -> Iterator[Term]:
        """Choices between losses (or probabilities) of one target by comparing them."""
        for term in self.present:
            fork = forked(term)
            if fork is not None:
                test, yes, no = fork
                losses = self._scored(yes) and self._scored(no) and any(self.compared(test))
                if (losses or self._by_the_answer(term, test)) and not carried(term):
                    yield term
            elif is_product(term) and len(term.parts) >= 2:
                yield from self._masked(term)
            elif term.op == "call" and term.called in _SMALLEST:
                among = options(term)
                scored = [part for part in among if self._scored(part)]
                several = len(scored) >= 2 and not any(carried(part, term) for part in scored)
                if several or (len(among) == len(scored) == 1 and chooses(scored[0])):
                    yield term

    def _by_the_answer(self, term: Term, test: Term) -> bool:
        """A choice between distributions by which of two gives the target more."""
        sizes = (one for one in self.of.below(test) if one.op == "compare" and one.value in ("<", "<=", ">", ">="))
        return id(term) in self.inside and any(all(map(self._read_at_target, one.parts)) for one in sizes)

    def _read_at_target(self, term: Term) -> bool:
        place = self.of.scored_place(peel(term))
        return place is not None and "read" in self.kinds(place)

    def _masked(self, term: Term) -> Iterator[Term]:
        """loss * (loss < other): a mask that is nothing but a comparison of two losses; the same of what a distribution
        is made of."""
        for mask, other in (term.parts[:2], term.parts[1::-1]):
            below = peel(mask)
            while below.op == "op" and below.value in ("~", "not", "-") and below.parts:  # ~better, 1 - better
                below = peel(below.parts[-1])
            is_test = below.op == "compare" or (below.op == "call" and below.called in _SIZES)
            if is_test and any(self.compared(below)) and (self._scored(other) or id(term) in self.inside):
                yield term

    def clipped(self) -> Iterator[Term]:
        """Losses that are cut off above, probabilities lifted to a floor: by more than a guard against nought."""
        for term, (_, high) in self._cuts():
            if id(term) not in self.inside and high is not None and 0 < high <= _HIGHEST:
                yield term
        yield from self.lifted()

    def lifted(self) -> Iterator[Term]:
        """Of those, the probabilities."""
        for term, (low, _) in self._cuts():
            if id(term) in self.inside and low is not None and _LOWEST <= low < 1.0:  # 1: a guard of what is divided by
                yield term

    def _cuts(self) -> Iterator[tuple[Term, tuple[float | None, float | None]]]:
        """What is cut off of a loss or a probability, and the bounds."""
        for term in self.nodes:
            operand = term.operand("a") if term.op == "call" and term.called in _CUTS else None
            if operand is not None and self._scored(operand):
                yield term, bounds_of(term)

    def _scored(self, term: Term) -> bool:
        if not self.of.targets:  # answers of yes and no, worked out of the token's bits, are no place in a row
            return _has_answers(term)
        return bool(self.kinds(term) & {"score", "key"}) and self.reads_target(term)

    def compared(self, test: Term) -> Iterator[Term]:
        """Comparisons by size of two losses; `better = a - b; better > 0` is one, too."""
        for term in self.of.below(test):
            if term.op == "compare" and term.value in ("<", "<=", ">", ">="):
                both = all(self._scored(side) for side in term.parts)
                if both or any(self._is_scored_difference(side) for side in term.parts):
                    yield term
            elif term.op == "call" and term.called in _SIZES and len([p for p in term.parts if self._scored(p)]) >= 2:
                yield term

    def _is_scored_difference(self, term: Term) -> bool:
        below = peel(term)
        return below.op == "op" and below.value == "-" and all(self._scored(part) for part in below.parts)

    # ---- a weight, a strength or a switch that knows the answer

    def gated(self) -> Iterator[Term]:
        """Switches and weights that read the target in another way than as a place or by matching a hint."""
        for term in self.present:
            fork = forked(term)
            if fork is not None:
                yield from self._switch(term, *fork)
            elif is_product(term):
                yield from self._weight(term)
        for term in self.present:
            if id(term) in self.inside and self._looks_up_target(term):
                yield term
            place = self.of.scored_place(term)
            if place is not None and self.kinds(place) and self.reads_target(place):
                whole = [part for part in term.parts if part is not place]
                yield from (one for part in whole for one in self._knows(part))

    def _knows(self, distribution: Term) -> Iterator[Term]:
        """What in a distribution reads the target before the distribution is read at it; whether a hint is it, too."""
        if not self.kinds(distribution) & {"score", "read", "key", "match"}:
            return
        for term in self.without_learning(distribution):
            place = self.of.scored_place(term)
            read = place is not None and not only_reshapes(place)
            asked = (read or self.matches(term)) and self.reads_target(term)
            if asked or self._looks_up_target(term) or self._counts_target(term) or self._met_target(term):
                yield term

    def matches(self, term: Term) -> bool:
        """hint == target, where the one is read and the other is not."""
        if term.op != "compare" or self.kinds(term) != {"match"}:
            return False
        return sum(map(self.reads_target, term.parts)) == 1

    def _counts_target(self, term: Term) -> bool:
        """counts[context, target]: how often the answer came before."""
        keyed = term.op == "item" and "key" in self.kinds(term) and self.of.streams.is_memory(term.parts[0])
        return keyed and self.reads_target(term.parts[1])

    def _met_target(self, term: Term) -> bool:
        """counts.gather(1, target) > 0: whether the answer came before."""
        if term.op != "compare" or term.value not in (">", ">=", "<", "<=") or "read" not in self.kinds(term):
            return False
        counted = (peel(part) for part in term.parts)
        tables = (looked_up(part) for part in counted if part.called in GATHERS)
        return self.reads_target(term) and any(each is not None and self.of.streams.is_memory(each) for each in tables)

    def reads_target(self, root: Term) -> bool:
        """Whether a value reads the target otherwise than through what a state has learned."""
        if id(root) not in self._now:
            below = self.without_learning(root) if self.kinds(root) else ()
            found = any(self.of.streams.is_stream(term) and bool(self.kinds(term)) for term in below)
            self._now[id(root)] = (root, found)
        return self._now[id(root)][1]

    def without_learning(self, root: Term) -> Iterator[Term]:
        """All that a value reads now; what a state has learned is another rule's matter."""
        return unlearned(root, lambda term: () if self.settled(term) else reads(term, self.of.streams))

    def asks_the_answer(self, term: Term) -> bool:
        """Whether a switch asks what a distribution says of the target; of a weight nobody looks so closely."""
        test = forked(term)
        return test is None or any(self._read_at_target(one) for one in self.of.below(test[0]))

    def looks_up(self, term: Term) -> bool:
        """Whether a switch looks its target up in a table, whatever else it reads."""
        test = forked(term)
        return test is None or any(self._looks_up_target(one) for one in self.of.below(test[0]))

    def origin(self, term: Term) -> Term:
        """The lookup by the target that a switch or a weight goes back to; the term itself where there is none."""
        test = forked(term)
        roots = (test[0],) if test is not None else term.parts
        if test is not None and "read" not in self.kinds(test[0]):
            return term
        found = (one for root in roots if self.kinds(root) for one in self.of.below(root) if self._looks_up_target(one))
        return next(found, term)

    def _switch(self, term: Term, test: Term, yes: Term, no: Term) -> Iterator[Term]:
        kinds = self.kinds(test)
        # Two losses that are made the same way are still two: of a model with its vectors, and without.
        two = term.called == "where" and yes is not no and "read" in kinds and self._scored(yes) and self._scored(no)
        if _has_checks(test) or (same(yes, no) and not two):
            return
        known = ("read" in kinds and self.reads_target(test)) or ("score" in kinds and not any(self.compared(test)))
        given = [arm for arm in (yes, no) if not is_nothing(arm)]
        if known and (len(given) == 2 or any(self._is_tilt(arm) for arm in given)):
            yield term
        if kinds == {"match"} and not any(self._is_plain(arm) for arm in (yes, no)):
            yield term  # a hint that is kept or dropped by whether it is right
        hint_only = kinds == {"match"} and self._scored(yes) and self._scored(no)
        if hint_only and self.has_other_place(yes) != self.has_other_place(no):
            yield term

    def _is_tilt(self, arm: Term) -> bool:
        """What a hint that is right takes off a loss, and no loss: a mask on losses leaves tokens out, one on this is a
        switch."""
        kinds = self.kinds(arm)
        return "match" in kinds and "score" not in kinds

    def _is_plain(self, arm: Term) -> bool:
        """A loss, a token, a constant: what a mask or the accepted tilt chooses between."""
        return self._scored(arm) or bool(self.kinds(arm)) or is_nothing(arm) or peel(arm).op == "const"

    def has_other_place(self, term: Term) -> bool:
        """Whether a distribution is read, or raised, at another token than the target: the hint, for the normaliser.
        The model that made the distribution looks up its own tables by the context; they are none, nor are the counts
        that a hint is chosen by where the loss is a model's."""
        for below in self._above_models(term):
            place = self.of.scored_place(below)
            looked = place is not None and (below.op == "call" or self.of.streams.is_key(place))
            counted = looked and self.scores_model and self.of.streams.is_memory(below.parts[0])
            if looked and not counted and place is not None and not self.kinds(place):
                return True
            if below.called in _RAISED and any(self.of.is_distribution(part) for part in below.parts[:1]):
                index = below.at(2, "index")
                if index is not None and not self.kinds(index):
                    return True
        return False

    @cached_property
    def scores_model(self) -> bool:
        """Whether a distribution that is read at the target is no table of counts."""
        for term in self.nodes:
            place = self.of.scored_place(term)
            base = looked_up(term) or term.parts[0] if place is not None else None
            if base is not None and place is not None and self.kinds(place) and not self.of.streams.is_memory(base):
                return True
        return False

    def _above_models(self, root: Term) -> Iterator[Term]:
        """What a value reads, down to the calls that make a row over the vocabulary out of activations."""
        waiting, seen = [root], set[int]()
        while waiting and len(seen) < 20_000:
            term = waiting.pop()
            if id(term) in seen:
                continue
            seen.add(id(term))
            yield term
            if not (term.called in _MODELS or (term.op == "op" and term.value == "@")):
                waiting.extend(reads(term, self.of.streams))

    def _weight(self, term: Term) -> Iterator[Term]:
        kinds = [self.kinds(part) for part in term.parts[:2]]
        if len(kinds) < 2 or not kinds[0] or not kinds[1]:
            return
        if all("score" in one for one in kinds):
            yield term
            return
        both = zip(term.parts, kinds, strict=False)
        reading = next((part for part, one in both if "read" in one and self.reads_target(part)), None)
        if reading is None:
            return
        other = kinds[1] if reading is term.parts[0] else kinds[0]
        if "match" in other or id(term) in self.inside or ("score" in other and self._has_complement(reading)):
            yield term

    def _has_complement(self, weight: Term) -> bool:
        """Whether 1 - weight, or ~weight, is used as well."""
        for term in self.nodes:
            one_minus = term.op == "op" and term.value == "-" and term.parts[0].constant() in (1, 1.0)
            if (one_minus or (term.op == "op" and term.value in ("~", "not"))) and same(term.parts[-1], weight, 8):
                return True
        return False

    def _looks_up_target(self, term: Term) -> bool:
        """table[target] where the table is no distribution and no memory of contexts."""
        if term.op != "item" or self.of.scored_place(term) is not None or is_mask(term.parts[1]):
            return False
        reads_it = "read" in self.kinds(term) & self.kinds(term.parts[1]) and not self.reads_target(term.parts[0])
        return reads_it and not self.of.streams.is_stream(term)

    # ---- ratios of counts

    def ratios(self) -> Iterator[tuple[Term, Term, Term]]:
        """(term, above, below) of the divisions in a contribution; a difference of logarithms is one."""
        for term in self.nodes:
            divides = term.op == "op" and term.value == "/"
            if divides or (term.called in ("div", "divide", "true_divide") and len(term.parts) >= 2):
                yield term, term.parts[0], term.parts[1]
            elif term.op == "op" and term.value == "-":
                above, below = peel(term.parts[0]), peel(term.parts[1])
                if above.called in _LOGS and below.called in _LOGS:
                    yield term, above, below

    def lookups(self, root: Term) -> list[tuple[Term, Term]]:
        """(lookup, key) of the counts that a value is made of, through sums, products, limits and choices."""
        found: list[tuple[Term, Term]] = []
        seen: set[int] = set()
        waiting = [root]
        while waiting and len(seen) < 400:
            term = peel(waiting.pop())
            if id(term) in seen:
                continue
            seen.add(id(term))
            key = self._key_of(term)
            if key is not None:
                found.append((term, key))
            elif term.op == "op" and term.value in ("+", "-", "*", "or"):
                waiting.extend(term.parts)
            elif term.op in ("choice", "merge", "list", "tuple"):
                waiting.extend(term.parts[1:] if term.op == "choice" else term.parts)
            elif term.op == "item":
                waiting.append(term.parts[0])
            elif term.op == "store" and picks(term.parts[1]):  # counts[found] = table[key][found]
                waiting.extend((term.parts[0], term.parts[2]))
            elif term.op == "call" and term.called in _LIMITS:
                waiting.extend(term.parts)
        return found

    def _key_of(self, term: Term) -> Term | None:
        streams = self.of.streams
        if term.op == "item" and (is_mask(term.parts[1]) or _is_written_out(term.parts[0])):
            return None
        if term.op == "item" and not streams.is_stream(term.parts[0]) and streams.from_tokens(term.parts[1]):
            return term.parts[1]
        if term.op == "call" and term.called in ("get", "index_select", "take", "gather"):
            base = looked_up(term) if term.called != "get" else term.receiver
            key = term.argument(0) if term.called == "get" else term.at(1 if term.called == "take" else 2, "index")
            if base is not None and key is not None and not streams.is_stream(base) and streams.from_tokens(key):
                return key
        return None

    def tokens(self, key: Term) -> list[Term]:
        return list(token_terms(key, self.of.streams))


def _is_written_out(base: Term) -> bool:
    """(0.35, 0.45, 0.55): settings, of which one is picked, and no counts."""
    row = peel(base)
    return row.op in ("tuple", "list") and bool(row.parts) and all(part.op == "const" for part in row.parts)


_CUTS = frozenset(("clamp", "clip", "clamp_max", "clamp_min", "minimum", "maximum", "min", "max"))
_HIGHEST = 20.0  # nats: a token of probability 2e-9; a guard against infinity stands higher
_LOWEST = 1e-5  # of a probability; a guard against log 0 is 1e-9 or less


_has_answers = Below(lambda term: term.called.startswith("binary_cross_entropy"))
_has_checks = Below(lambda term: term.called in _CHECKS)


def bounds_of(term: Term) -> tuple[float | None, float | None]:
    """(lower, upper) bound by a number."""
    numbers = {key: part.constant() for part, key in zip(term.parts, term.keys, strict=True) if key != "self"}
    first = [value for key, value in numbers.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    word = term.called
    low, high = numbers.get("min", numbers.get("a_min")), numbers.get("max", numbers.get("a_max"))
    if word in ("clamp_min", "maximum", "max") and low is None:
        low = first[0] if first else None
    elif word in ("clamp_max", "minimum", "min") and high is None:
        high = first[0] if first else None
    elif word in ("clamp", "clip") and low is None and high is None:
        plain = [
            value for key, value in numbers.items() if isinstance(key, int) and not (key == 0 and term.receiver is None)
        ]
        low, high = (*plain, None, None)[:2]
    return _number(low), _number(high)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


_LIMITS = frozenset(
    """minimum maximum min max clip clamp clamp_min clamp_max where log log2 log1p float int nan_to_num sum
    array stack cat""".split()  # noqa: SIM905
)
