"""What the interpreter knows of a value: a constant where it is one, the objects it may be, and where it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fairway.audit.flow.names import either
from fairway.audit.flow.tokens import Cut, Span, Tok, merged, merged_spans

if TYPE_CHECKING:
    from fairway.audit.flow.heap import Obj


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""No constant is known."""

RAW, GRAD, ONE_HOT, LENGTH, SCALED, CLOCK, POSITIONS, ONE_ROW = (1, 2, 4, 8, 16, 32, 64, 128)
WEIGHTS, TEXT, INDEXED, REPEATS, CAPPED, MASK, DIGEST, MOVED, CLIPPED, FIRST, CLAIMED, SPREAD, SORTED, LATER, HEATED = (
    256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576, 2097152, 4194304,
)  # fmt: skip
NUMBER = 8388608
"""Flags. RAW: token ids, not passed through any state; GRAD: a gradient; ONE_HOT: a one-hot form of token ids;
LENGTH: a size or a place in data; SCALED: logits multiplied by a state of their own or by a chosen number; CLOCK: a
reading of the wall clock; POSITIONS: arange; ONE_ROW: a batch of one; WEIGHTS: parameters, or a copy of them;
TEXT: a message with values in it; INDEXED: out of a slice of a list, whose cut (in `cuts`) holds for what it cuts;
REPEATS: an element that its list holds several times; CAPPED: whether a counter has passed a constant;
MASK: true or false for each token, by comparing it; DIGEST: the bytes of all of it, or a digest of them;
MOVED: a number or a vector that a gradient was added to; CLIPPED: measured from an end that may be the data's;
FIRST: the first place that a slice of a list let through; SPREAD: one row seen as one for each window;
CLAIMED: a number that processes count up together: another one whenever it is asked for; SORTED: places of the
data in the order of what stands there, alike ones in the order of the text, or what was taken out in that order;
LATER: of these all but the first: beside the places themselves, each is the next alike; HEATED: scaled by a number
that was chosen, and by no state; NUMBER: one number, float(...), out of what weights and a choice are kept in."""

RANKED = frozenset(("RANK",))
"""In `env`: it depends on which of several processes this is."""

ORDERED = frozenset(("#order",))
"""In `env`: it stands where a sort by lengths has put it."""

REFS, _WORDS = 12, 10  # objects and literal texts that one value remembers

NO_OBJECTS: frozenset[Any] = frozenset()
NO_TOKENS: frozenset[Tok] = frozenset()


class Value:
    """An abstract value; never changed once made.

    const: the Python constant, or MISSING                       refs: the heap objects it may be
    items: the elements of a literal tuple or list, or None      toks: the tokens it was computed from
    states: the learners (models, deltas, tables) it read        knows: bits of the Updates that those had seen
    losses: bits of the Scores in it                             choices: bits of the Choices it hangs on
    words: literal texts in it                                   spans: the loop iterations a number depends on
    unit: for such a number, what one iteration adds ("1", "K"); sym: how it was computed, as text
    less: what was subtracted in it; flags: see above; limit: an upper bound that a constant sets
    lead: a reading of the clock is lead[0] times the seconds plus lead[1]; env: the settings it depends on
    cuts: for a mask, the part of a window that it lets through
    """

    __slots__ = (
        "choices", "const", "cuts", "env", "flags", "items", "knows", "lead", "less", "limit", "losses", "refs",
        "spans", "states", "sym", "toks", "unit", "words",
    )  # fmt: skip

    def __init__(
        self,
        const: Any = MISSING,
        refs: frozenset[Obj] = NO_OBJECTS,
        items: tuple[Value, ...] | None = None,
        toks: frozenset[Tok] = NO_TOKENS,
        states: frozenset[Obj] = NO_OBJECTS,
        knows: int = 0,
        losses: int = 0,
        choices: int = 0,
        words: tuple[str, ...] = (),
        spans: tuple[Span, ...] = (),
        unit: str = "",
        sym: str = "",
        less: frozenset[str] = frozenset(),
        flags: int = 0,
        limit: float | None = None,
        lead: tuple[float, float] = (1.0, 0.0),
        env: frozenset[str] = frozenset(),
        cuts: frozenset[Cut] = frozenset(),
    ) -> None:
        self.const, self.refs, self.items, self.toks, self.states = const, refs, items, toks, states
        self.knows, self.losses, self.choices, self.words, self.spans = knows, losses, choices, words, spans
        self.unit, self.sym, self.less, self.flags, self.limit = unit, sym, less, flags, limit
        self.lead, self.env, self.cuts = lead, env, cuts

    def but(self, **changed: Any) -> Value:
        """A copy with some fields changed."""
        new = Value.__new__(Value)
        for name in Value.__slots__:
            setattr(new, name, getattr(self, name))
        for name, value in changed.items():
            setattr(new, name, value)
        return new

    @property
    def raw(self) -> bool:
        """Token ids of a data set."""
        return bool(self.flags & RAW and self.toks)

    @property
    def active(self) -> bool:
        """What a state made of tokens: activations, logits, probabilities, losses."""
        return bool(self.states and self.toks and not self.flags & RAW)

    def __repr__(self) -> str:
        said = [f"{name}={value!r}" for name in Value.__slots__ if (value := getattr(self, name)) not in _DULL]
        return f"Value({', '.join(said)})"


_DULL: tuple[Any, ...] = (MISSING, None, 0, (), "", frozenset())

NOTHING: Final = Value()
NONE: Final = Value(const=None)


def same(one: Any, other: Any) -> bool:
    """Whether two constants are one: equal and of one type."""
    return one is other or (type(one) is type(other) and one == other)


def join(one: Value, other: Value) -> Value:
    """One or the other."""
    if one is other:
        return one
    if one is NOTHING and not other.items and other.const is MISSING:
        return other
    kept = same(one.const, other.const)
    items = one.items
    if items is not None or other.items is not None:
        theirs = other.items
        if items is None or theirs is None or len(items) != len(theirs):
            joined = None
            if items is None and one.const is None:  # None or a tuple: as the tuple, for it will be taken apart
                joined = theirs
            elif theirs is None and other.const is None:
                joined = items
            elif items or theirs:
                return join(_poured(one), _poured(other))
            items = joined
        else:
            items = tuple(join(a, b) for a, b in zip(items, theirs, strict=True))
    refs = one.refs | other.refs if one.refs != other.refs else one.refs
    if len(refs) > REFS:
        refs = frozenset(sorted(refs, key=lambda each: each.number)[:REFS])
    return Value(
        one.const if kept else MISSING,
        refs,
        items,
        _toks(one.toks, other.toks),
        one.states | other.states if one.states != other.states else one.states,
        one.knows | other.knows,
        one.losses | other.losses,
        one.choices | other.choices,
        one.words if one.words == other.words or not other.words else either(one.words, other.words, _WORDS),
        merged_spans(one.spans, other.spans),
        one.unit if one.unit == other.unit or not other.unit else other.unit if not one.unit else "",
        one.sym if one.sym == other.sym else f"or({one.sym},{other.sym})"[:120],
        one.less | other.less if one.less != other.less else one.less,
        _flags(one, other),
        one.limit if one.limit == other.limit else None,
        one.lead if one.flags & CLOCK or not other.flags & CLOCK else other.lead,
        one.env | other.env if one.env != other.env else one.env,
        one.cuts | other.cuts if one.cuts != other.cuts else one.cuts,
    )


def _poured(value: Value) -> Value:
    """A tuple as one value that has seen all that its items saw: what it is joined with is no such tuple."""
    if value.items is None:
        return value
    result = value.but(items=None)
    for item in value.items[:24]:
        result = join(result, _poured(item)).but(const=MISSING)
    return result


def blend(*values: Value) -> Value:
    """What is computed from all of these: their provenance together, no constant, no objects."""
    if len(values) == 1:
        first = values[0]
        if first.const is MISSING and not first.refs and first.items is None and not first.sym:
            return first
    toks: frozenset[Tok] = NO_TOKENS
    states: frozenset[Obj] = NO_OBJECTS
    env: frozenset[str] = frozenset()
    cuts: frozenset[Cut] = frozenset()
    less: frozenset[str] = frozenset()
    knows = losses = choices = flags = 0
    words: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    mixed = False
    for value in values:
        if value.toks:
            mixed = mixed or not value.flags & RAW
            toks = _toks(toks, value.toks)
        if value.states:
            states = states | value.states
        if value.env:
            env = env | value.env
        if value.cuts:
            cuts = cuts | value.cuts
        if value.less:
            less = less | value.less
        knows, losses, choices = knows | value.knows, losses | value.losses, choices | value.choices
        flags |= value.flags
        words = _words(words, value.words)
        spans = merged_spans(spans, value.spans)
    if mixed or states:
        flags &= ~RAW
    if flags & WEIGHTS and not all(value.flags & WEIGHTS for value in values if value.toks or value.states):
        flags &= ~WEIGHTS
    if flags & MASK and not all(value.flags & MASK for value in values if value.toks or value.states):
        flags &= ~MASK
    return Value(
        toks=toks, states=states, knows=knows, losses=losses, choices=choices, words=words, spans=spans, flags=flags,
        env=env, cuts=cuts, less=less, lead=next((value.lead for value in values if value.flags & CLOCK), (1.0, 0.0)),
    )  # fmt: skip


def _toks(one: frozenset[Tok], other: frozenset[Tok]) -> frozenset[Tok]:
    if one is other or not other:
        return one
    return merged(one | other) if one else other


def _words(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    if one == other or not other:
        return one
    return (one + tuple(word for word in other if word not in one))[-_WORDS:]


def _flags(one: Value, other: Value) -> int:
    flags = one.flags | other.flags
    if flags & RAW:  # raw only where every part that has tokens is
        parts = [value for value in (one, other) if value.toks]
        if not all(value.flags & RAW for value in parts) or any(value.states for value in (one, other)):
            flags &= ~RAW
    masks = all(value.flags & MASK for value in (one, other) if value.toks or value.states)
    return flags if masks else flags & ~MASK


def hashable(const: object) -> bool:
    """Whether a constant can be a key."""
    try:
        hash(const)
    except TypeError:
        return False
    return True
