"""The ground of the interpreter: where it stands, what it writes down, how branches part and meet."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from fairway.audit.flow import events
from fairway.audit.flow.heap import Change, Heap, Obj, joined_slot
from fairway.audit.flow.tokens import Span, Tok, merged_spans, narrowed
from fairway.audit.flow.values import MISSING, NO_OBJECTS, NO_TOKENS, NOTHING, REPEATS, WEIGHTS, Value, blend, join
from fairway.audit.reading.script import Script
from fairway.audit.settings import Settings
from fairway.audit.verdict import Place

FUEL = 1_500_000  # expressions; about 4 s
DEPTH = 45  # calls within calls


class OutOfFuel(Exception):
    """The script has more steps than the interpreter will take."""


@dataclass
class Loop:
    """A loop under way: its breaks and continues out of branches that are still open."""

    forks: int
    breaks: list[Change] = field(default_factory=list)
    continues: list[Change] = field(default_factory=list)
    broke: bool = False
    chosen: int = 0  # Choices that a break hangs on
    left: int = 0  # continues so far
    skips: Place | None = None  # where the rest of this turn is left out for some of what it goes through


@dataclass
class Frame:
    """A call under way."""

    obj: Obj
    script: Script
    globals: Obj
    closure: tuple[Obj, ...] = ()
    node: Any = None
    owner: Obj | None = None  # the class of the method, for super()
    outside: frozenset[str] = frozenset()  # names declared global or nonlocal
    marks: list[int] = field(default_factory=list)
    returns: list[tuple[Value, Change]] = field(default_factory=list)
    value: Value | None = None
    yields: list[Value] = field(default_factory=list)
    loops: list[Loop] = field(default_factory=list)
    line: int = 0
    sent: Value | None = None  # what a coroutine that goes on was sent
    within: Callable[[Value], None] | None = None  # of a context manager: what stands in the `with`, for its yield
    views: dict[str, ast.Subscript] = field(default_factory=dict)  # names of parts: `row = sums[a:b]`


class Core:
    """State and bookkeeping; what evaluates and calls stands in the classes above."""

    def __init__(self, script: Script, settings: Settings, fuel: int = FUEL) -> None:
        self.settings, self.entry, self.fuel = settings, script, fuel
        self.heap, self.trace = Heap(), events.Trace()
        self.frames: list[Frame] = []
        self.nest: list[tuple[int, int]] = []
        self.control: list[int] = []
        self.guards: list[Place] = []
        self.asked: list[frozenset[Tok]] = []  # tokens that the branches under way hang on
        self.swayed: list[frozenset[Tok]] = []  # and of those that what a model makes of tokens decides
        self.files = self.heap.new("dict", "files")
        self.foreign: dict[str, Value] = {}
        self.turns: dict[int, int] = {}  # loop -> iterations walked
        self.caps: list[int] = []  # loops under way that a branch leaves when a counter or the clock says so
        self.picks = False  # a length, a loss or the clock was held against a constant since the last condition
        self.ends: dict[int, tuple[str, ...]] = {}  # loop -> the end of its range: as computed, as written
        self.strided: set[int] = set()  # loops whose step has a number written out
        self.backwards: set[int] = set()  # loops that go from the end to the beginning
        self.booked: list[int] = []  # losses (bits) in the order in which they were first added to anything
        self.quiet = False  # an element is read only to be written anew
        self.computed = 0  # updates (bits): bytes of weights that activations were used for
        self.logs = 0  # losses (bits) that a logarithm made: of rows of probabilities, until a target is picked
        self.forwards = 0  # models whose forward is under way
        self.entering: dict[int, Callable[[Value], None]] = {}  # call of a `with` -> what is to be walked at its yield
        self.handles: dict[tuple[int, int], Obj] = {}  # (line, call) that registers hooks -> what takes them off
        self.hooked: dict[Obj, dict[Obj, None]] = {}  # what takes hooks off -> the modules
        self.stopped = NOTHING  # what the last generator to end returned
        self.said_unknown: set[tuple[str, int, str]] = set()

    # What the classes above do.
    def named_fields(self, cls: Obj) -> tuple[str, ...]:
        raise NotImplementedError

    def evaluate(self, node: ast.expr) -> Value:
        raise NotImplementedError

    def call(self, function: Value, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        raise NotImplementedError

    def assign(self, target: ast.expr, value: Value) -> None:
        raise NotImplementedError

    def overwrite(self, target: ast.expr, value: Value) -> None:
        raise NotImplementedError

    def enter(self, value: Value, node: ast.expr) -> Value:
        raise NotImplementedError

    def replayed(self, obj: Obj) -> Value:
        raise NotImplementedError

    def path(self, args: list[Value], node: ast.AST | None) -> Value:
        raise NotImplementedError

    def piece_of_path(self, value: Value, name: str) -> Value:
        raise NotImplementedError

    def pieces_of_path(self, value: Value) -> Value | None:
        raise NotImplementedError

    # Places and events.
    @property
    def frame(self) -> Frame:
        return self.frames[-1]

    @property
    def calls(self) -> list[Frame]:
        """The calls under way, from the main program inwards: a text that only executes another one is none."""
        first = 0
        for n, (outer, inner) in enumerate(zip(self.frames, self.frames[1:], strict=False), start=1):
            if inner.node is None and inner.script.path.startswith(f"{outer.script.path}!"):
                first = n
        return self.frames[first:] if first else self.frames

    def place(self, node: ast.AST | None = None) -> Place:
        frame = self.frame
        line = getattr(node, "lineno", 0) or frame.line
        return Place(frame.script.path, frame.script.line(line))

    def _stand(self, node: ast.AST | None) -> dict[str, Any]:
        stack = tuple(Place(each.script.path, each.script.line(each.line)) for each in self.calls[-12:])
        number = len(self.trace.events)
        guards = tuple(dict.fromkeys(self.guards))
        return {"number": number, "place": self.place(node), "stack": stack, "nest": tuple(self.nest), "guards": guards}

    def note(self, kind: Callable[..., Any], node: ast.AST | None, **fields: Any) -> Any:
        """Write an event down."""
        event = kind(**self._stand(node), **fields)
        self.trace.events.append(event)
        return event

    def unknown(self, node: ast.AST | None, why: str) -> None:
        """Write down where the interpreter gives up, once for each place."""
        place = self.place(node)
        key = (place.file, place.line, why)
        if key not in self.said_unknown:
            self.said_unknown.add(key)
            self.note(events.Unknown, node, why=why)

    def burn(self) -> None:
        self.trace.steps += 1
        if self.trace.steps > self.fuel:
            if self.trace.complete:
                self.trace.complete = False
                self.unknown(None, "the script has more steps than are followed")
            raise OutOfFuel

    def book(self, value: Value) -> None:
        """Losses are added to a sum or a list: for all of what a loop goes through, or with some left out."""
        places = [loop.skips for frame in self.frames for loop in frame.loops if loop.skips is not None]
        for bit in events.bits(value.losses):
            if bit not in self.trace.picked:
                self.trace.picked[bit] = places[0] if places else None
                self.booked.append(bit)
            elif places or value.choices & self.trace.masked.get(bit, 0):
                continue
            elif tuple(self.nest[: len(self.trace.scores[bit].nest)]) == self.trace.scores[bit].nest:
                self.trace.picked[bit] = None  # the other sum of the same turn was the partial one

    # Branches.
    def fork(self, branches: Iterable[Callable[[], bool]]) -> bool:
        """Run each branch from the present state, then go on from all that came through; False: none did."""
        heap, frame = self.heap, self.frame
        heap.open += 1
        mark = heap.mark()
        frame.marks.append(mark)
        outcomes: list[Change] = []
        for branch in branches:
            alive = branch()
            if alive:
                outcomes.append(heap.changes(mark))
            heap.back(mark)
        frame.marks.pop()
        if outcomes:
            heap.merge(outcomes)
        heap.close()
        return bool(outcomes)

    def settle(self, pending: list[Change], alive: bool) -> None:
        """Join what left a branch early (return, break, continue) to where it comes out."""
        if not pending:
            return
        if not alive:
            self.heap.merge(pending)
            return
        for outcome in pending:
            for (obj, key), value in outcome.items():
                if value is not MISSING:
                    self.heap.set(obj, key, joined_slot(obj.slots.get(key, MISSING), value))

    def new(self, kind: str, data: Any = None, node: ast.AST | None = None) -> Obj:
        return self.heap.new(kind, data, tuple(self.nest), self.place(node) if self.frames else None)

    def ref(self, obj: Obj, **fields: Any) -> Value:
        return Value(refs=frozenset((obj,)), **fields)

    def outside(self, name: str) -> Value:
        """A name that is not in the script, as `torch.where`."""
        found = self.foreign.get(name)
        if found is None:
            found = self.foreign[name] = Value(refs=frozenset((self.heap.new("foreign", name),)))
        return found

    @property
    def chosen(self) -> int:
        """The Choices that the present branch hangs on."""
        mask = 0
        for each in self.control:
            mask |= each
        return mask

    # What a value holds.
    def knows(self, obj: Obj) -> int:
        """The Updates that a state, its parts and what it is part of have seen."""
        mask: int = obj.slots.get("#learned", 0) | obj.slots.get("#family", 0)
        for _ in range(40):
            if obj.owner is None or obj.owner is obj:
                break
            obj = obj.owner
            mask |= obj.slots.get("#learned", 0)
        return mask

    def learner(self, obj: Obj) -> bool:
        """Whether an object is a state that learns: a model, a part of one, a leaf of a gradient, a table."""
        return (
            obj.owner is not None or "#module" in obj.slots or "#leaf" in obj.slots or bool(obj.slots.get("#learned"))
        )

    def flat(self, value: Value, deep: int = 4) -> Value:
        """The provenance of a value and of what it refers to, without the objects themselves."""
        if not value.refs and value.items is None:
            return value
        own = value.but(refs=NO_OBJECTS, items=None)
        empty = value.const is MISSING and self.plain(own) and not (own.flags or own.words or own.spans or own.choices)
        parts = [] if empty else [own]
        if value.items is not None and deep:
            parts += [self.flat(item, deep - 1) for item in value.items[:24]]
        for obj in value.refs:
            held = self._held(obj, deep)
            parts += [self.tagged(part, value.spans) for part in held] if obj.kind == "tensor" else held
        parts = [part for part in parts if part is not NOTHING]
        if len(parts) == 1:
            return parts[0]
        return blend(*parts) if parts else NOTHING

    def _held(self, obj: Obj, deep: int) -> list[Value]:
        slots, parts = obj.slots, []
        if self.learner(obj):
            root = obj.root
            mask = self.knows(obj)
            weights = obj.owner is not None or "#module" in slots or "#leaf" in slots
            flags = WEIGHTS if weights else 0
            choices = slots.get("#choices", 0) | root.slots.get("#choices", 0)
            parts.append(Value(states=frozenset((root,)), knows=mask, choices=choices, flags=flags))
        if obj.kind == "tensor":
            parts.append(self._content_of(obj))
        elif obj.kind in ("list", "dict", "generator") and deep:
            parts += [self.flat(held, deep - 1) for held in self.held(obj)]
        elif obj.kind == "instance" and deep:
            parts += [self.flat(slots.get(name, NOTHING), deep - 1) for name in self.named_fields(obj.data)]
        elif obj.kind == "thing":
            parts.append(self.flat(slots.get("#content", NOTHING), deep - 1) if deep else NOTHING)
        return parts

    def _content_of(self, obj: Obj) -> Value:
        """What lies in a tensor; of a table: whose tokens it was filled from, its Updates say."""
        held = self.content(obj)
        table = obj.slots.get("#learned") and "#leaf" not in obj.slots and obj.owner is None
        return held.but(toks=NO_TOKENS) if table and held.toks and not held.losses else held

    def held(self, obj: Obj) -> list[Value]:
        """All that a list or dict may hold."""
        return [each for key, each in list(obj.slots.items()) if isinstance(each, Value) and key != "#keys"]

    def tagged(self, value: Value, spans: Iterable[Span], deep: int = 3) -> Value:
        """The value as what these iterations cut out."""
        spans = tuple(spans)
        if not spans:
            return value
        items = value.items
        if items is not None and deep:
            items = tuple(self.tagged(item, spans, deep - 1) for item in items)
        toks = frozenset(narrowed(tok, spans) for tok in value.toks) if value.toks and not value.losses else value.toks
        fits = not value.losses and not isinstance(value.const, (str, bool)) and value.const is not None
        kept = merged_spans(value.spans, spans, keep_new=True) if fits else value.spans
        return value.but(items=items, toks=toks, spans=kept)

    def parted(self, value: Value, part: str, deep: int = 2) -> Value:
        """The value as what a constant number let through."""
        items = value.items
        if items is not None and deep:
            items = tuple(self.parted(item, part, deep - 1) for item in items)
        toks = frozenset(tok if tok.part else replace(tok, part=part) for tok in value.toks)
        return value.but(items=items, toks=toks)

    def since(self, born: tuple[tuple[int, int], ...]) -> tuple[Span, ...]:
        """The iterations of the loops that were entered since."""
        known = {loop for loop, _ in born}
        return tuple(sorted((loop, turn, turn) for loop, turn in self.nest if loop not in known))

    def repeats(self, value: Value, born: tuple[tuple[int, int], ...], deep: int = 2) -> Value:
        """An element that is put into a list once in each iteration of a loop that it does not depend on: it comes
        again whenever the list is gone through."""
        if value.items is not None and deep:
            return value.but(items=tuple(self.repeats(item, born, deep - 1) for item in value.items))
        if not value.spans or value.refs or value.losses:
            return value
        known = {loop for loop, _, _ in value.spans} | {loop for loop, _ in born}
        again = any(loop not in known and self.turns.get(loop, 1) > 1 for loop, _ in self.nest)
        return value.but(flags=value.flags | REPEATS) if again else value

    def here(self) -> tuple[Span, ...]:
        return self.since(())

    def content(self, obj: Obj) -> Value:
        found = obj.slots.get("#content", NOTHING)
        return found if isinstance(found, Value) else NOTHING

    def add_content(self, obj: Obj, value: Value, key: str = "#content") -> None:
        old = obj.slots.get(key)
        self.heap.set(obj, key, value if old is None else join(old, value))

    def text_of(self, value: Value) -> str:
        """The literal text of a path, as far as it is known."""
        return value.const if isinstance(value.const, str) else "~".join(value.words)

    @staticmethod
    def plain(value: Value) -> bool:
        """A number or text without any provenance that matters."""
        return not (value.refs or value.items or value.toks or value.losses or value.knows or value.states)


__all__ = ["NO_OBJECTS", "NO_TOKENS", "Core", "Frame", "Loop", "OutOfFuel"]
