"""A term: how a value was computed, as a graph of operations down to constants, files and settings.

`op` says what kind of node it is; `value` its name or constant; `parts` what it was computed from:

    const    value: the constant; parts: what it was folded from          name     value: "torch.where", "os.environ"
    free     value: what is not known ("rank", "exception")               env      value: variable; parts: default
    op       value: "+", "**", "not", "and"...                            compare  value: "<", "in"...
    call     value: "torch.where" or ".gather"; parts: (receiver,) + arguments; keys: "self", 0, 1, "dim"...
    item     parts: (base, index)           slice  parts: (low, high, step)            attr  value: name; parts: (base,)
    choice   parts: (condition, if true, if false)                        merge    parts: one of these
    store    parts: (base, index, value): base after base[index] = value
    mutate   value: ".append"; parts: (base, arguments...): base after base.append(...)
    each     parts: (iterable,): one of its elements; value: the round of the loop
    round    parts: (element,): an element as that of one round of a loop; value: the round
    tuple, list, set, dict (keys and values in turn; value "comp": one part stands for all), text (an f-string's fields)
    function, class, object, bound, super, namespace: value holds the thing itself
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

Key = str | int


class Term:
    """One node; equal only to itself. file and line: where its text stands; called: the last word of what a call calls
    (`gather` for `.gather` and `torch.gather`), "" for other terms."""

    __slots__ = ("__weakref__", "called", "file", "keys", "line", "op", "parts", "value")

    def __init__(
        self,
        op: str,
        parts: tuple["Term", ...] = (),
        value: Any = None,
        file: str = "",
        line: int = 0,
        keys: tuple[Key, ...] = (),
    ) -> None:
        self.op, self.parts, self.value, self.file, self.line, self.keys = op, parts, value, file, line, keys
        self.called = str(value).rsplit(".", 1)[-1] if op == "call" else ""

    def __repr__(self) -> str:
        return shown(self, 3)

    def argument(self, key: Key, *others: Key) -> "Term | None":
        """A call's argument by position (from 0, the receiver not counted) or name."""
        for wanted in (key, *others):
            if wanted in self.keys:
                return self.parts[self.keys.index(wanted)]
        return None

    @property
    def receiver(self) -> "Term | None":
        """What a method was called on."""
        return self.argument("self")

    def operand(self, *others: Key) -> "Term | None":
        """What a function or a method works on: x of x.gather(...) and of torch.gather(x, ...)."""
        return self.receiver if self.receiver is not None else self.argument(0, "input", *others)

    def at(self, position: int, *names: Key) -> "Term | None":
        """Argument `position` of the function form f(x, ...), which is position - 1 of the method form x.f(...)."""
        return self.argument(position - 1 if self.receiver is not None else position, *names)

    def constant(self) -> Any:
        """The constant, or None."""
        return self.value if self.op == "const" else None


def walk(*roots: Term, into: Callable[[Term], bool] | None = None) -> Iterator[Term]:
    """Every term below the roots, each once, the roots first. into(term): whether to go below it."""
    seen: set[int] = set()
    waiting = list(roots)
    while waiting:
        term = waiting.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        yield term
        if into is None or into(term):
            waiting.extend(term.parts)


def any_below(root: Term, test: Callable[[Term], bool], into: Callable[[Term], bool] | None = None) -> bool:
    return any(test(term) for term in walk(root, into=into))


class Below:
    """Whether a test holds anywhere below a term, itself included: worked out once for each term that is alive.
    into(term): whether to go below it; parts(term): what stands there."""

    def __init__(
        self,
        test: Callable[[Term], bool],
        into: Callable[[Term], bool] = lambda term: True,
        parts: Callable[[Term], Iterable[Term]] = lambda term: term.parts,
    ) -> None:
        self.test, self.into, self.parts = test, into, parts
        self.known: WeakKeyDictionary[Term, bool] = WeakKeyDictionary()

    def __call__(self, root: Term) -> bool:
        known, waiting = self.known, [(root, False)]
        while waiting:
            term, done = waiting.pop()
            if term in known:
                continue
            if done:
                known[term] = any(known.get(part, False) for part in self.parts(term))
            elif self.test(term):
                known[term] = True
            elif not term.parts or not self.into(term):
                known[term] = False
            else:
                waiting.append((term, True))
                waiting.extend((part, False) for part in self.parts(term))
        return known[root]


# What changes a value's type, place or shape and not the value.
SAME = frozenset(
    """to cpu cuda float double half bfloat16 int long item detach clone contiguous view reshape squeeze unsqueeze
    flatten expand expand_as view_as numpy tolist astype copy asarray array tensor as_tensor from_numpy ravel type_as
    ascontiguousarray int64 int32 float64 float32 uint64 bool_ pin_memory requires_grad_ transpose permute ensure_tensor
    float_ deepcopy list tuple str round nan_to_num broadcast_to short type t cast""".split()  # noqa: SIM905
)


def peel(term: Term) -> Term:
    """The value beneath changes of type, place and shape."""
    while term.op == "call" and term.called in SAME:
        below = term.operand("object", "data", "a", "obj")
        if below is None:
            break
        term = below
    return term


def alternatives(term: Term, limit: int = 64) -> list[Term]:
    """The values that a term may be, the latest round of a loop first: through choices, merges, changes of type."""
    found: list[Term] = []
    seen: set[int] = set()
    waiting = [term]
    while waiting and len(found) < limit:
        one = peel(waiting.pop())
        if id(one) in seen:
            continue
        seen.add(id(one))
        if one.op in ("choice", "merge"):
            waiting.extend(one.parts[:0:-1] if one.op == "choice" else one.parts)
        else:
            found.append(one)
    return found


def layers(term: Term) -> list[Term]:
    """A container and what it was before each thing that was done to it."""
    found: list[Term] = []
    waiting, seen = [term], set[int]()
    while waiting and len(seen) < 60:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        found.append(one)
        if one.op in ("store", "mutate"):
            waiting.append(one.parts[0])
        elif one.op in ("merge", "choice"):
            waiting.extend(one.parts[1:] if one.op == "choice" else one.parts)
    return found


_NAMED = frozenset(("const", "name", "env", "op", "compare", "call", "attr", "free", "mutate", "each", "round"))


def same(a: Term, b: Term, depth: int = 12) -> bool:
    """Whether two terms are written alike: same operations down to the same leaves."""
    if a is b:
        return True
    a, b = peel(a), peel(b)
    if a is b:
        return True
    if depth == 0 or a.op != b.op or len(a.parts) != len(b.parts) or a.keys != b.keys:
        return False
    if a.op in _NAMED and not _equal(a, b):
        return False
    if a.op in ("object", "function", "class", "bound", "namespace", "super") and a.value is not b.value:
        return False
    if a.op == "const":
        return True
    if not a.parts and a.op in ("free", "object"):
        return a.value == b.value
    return all(same(x, y, depth - 1) for x, y in zip(a.parts, b.parts, strict=True))


def _equal(a: Term, b: Term) -> bool:
    try:
        return type(a.value) is type(b.value) and bool(a.value == b.value)
    except Exception:
        return False


def shown(term: Term, depth: int = 3) -> str:
    """A short reading of a term, for messages and for whoever debugs a rule."""
    if term.op in ("const", "name", "free"):
        return str(term.value)[:60]
    if depth == 0:
        return "…"
    inner = [shown(part, depth - 1) for part in term.parts[:4]]
    if term.op == "op" and len(inner) == 2:
        return f"({inner[0]} {term.value} {inner[1]})"
    if term.op == "item":
        return f"{inner[0]}[{inner[1]}]"
    head = term.value if term.op in ("call", "op", "attr", "mutate", "env", "compare") else term.op
    return f"{head}({', '.join(inner)}{', …' if len(term.parts) > 4 else ''})"
