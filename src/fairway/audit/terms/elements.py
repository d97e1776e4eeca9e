"""What a container holds: one of its elements, the item at a place."""

from typing import TYPE_CHECKING

from fairway.audit.settings import is_setting
from fairway.audit.terms import calls, objects
from fairway.audit.terms.term import Term, alternatives, peel
from fairway.audit.terms.things import constant

if TYPE_CHECKING:
    from fairway.audit.terms.machine import Machine


def element(m: "Machine", term: Term, file: str, line: int) -> Term:
    """One of an iterable's elements. Terms share their parts: without a memory, lists of lists took minutes."""
    if term.op not in ("merge", "choice", "mutate"):
        return _element(m, term, file, line)
    key = (id(term), file, line)
    if key not in m.elements:
        m.elements[key] = (term, _element(m, term, file, line))
    return m.elements[key][1]


def _element(m: "Machine", term: Term, file: str, line: int) -> Term:
    if term.op in ("list", "tuple", "set") and term.parts:
        if len(term.parts) == 1:
            one = term.parts[0]
            return one.parts[1] if one.op == "choice" and one.value == "filter" else one
        return Term("merge", term.parts[:64], None, file, line)
    if term.op == "dict" and term.parts:
        return Term("merge", term.parts[::2][:64], None, file, line)
    if term.op == "const" and isinstance(term.value, (tuple, list, frozenset)) and 0 < len(term.value) <= 64:
        return Term("merge", tuple(constant(one, file, line) for one in term.value), None, file, line)
    if term.op == "mutate" and term.value in (".append", ".add", ".appendleft", ".extend", ".insert"):
        added = term.parts[-1]
        if term.value == ".extend":
            added = element(m, added, file, line)
        empty = term.parts[0].op in ("list", "set") and not term.parts[0].parts
        return added if empty else Term("merge", (element(m, term.parts[0], file, line), added), None, file, line)
    grown = _grown(term) if term.op == "choice" else None
    if grown is not None:  # rows.append(x) or rows.append(y): which of them, the condition tells
        base, added = grown
        return added if _empty(base) else Term("merge", (element(m, base, file, line), added), None, file, line)
    if term.op in ("merge", "choice"):
        options = [p for p in (term.parts[1:] if term.op == "choice" else term.parts) if not _empty(p)]
        found = [element(m, option, file, line) for option in options[:8]]
        if len(found) == 1:
            return found[0]
        if found:
            return Term("merge", tuple(found), None, file, line)
    if term.op == "call" and term.called in _PASSING:
        below = term.argument(0, "dataset", "iterable")
        if below is not None:
            return element(m, below, file, line)
    if term.op == "call" and term.called in _PICKING and len(term.parts) == 2:
        return element(m, term.parts[1], file, line)
    keys = _keys(term) if term.op == "store" and term.value is None else None
    if keys:  # of a table its keys, and nothing that it holds
        return keys[0] if len(keys) == 1 else Term("merge", tuple(keys), None, file, line)
    sliced = term.op == "item" and term.parts[1].op == "slice"
    if sliced or term.op == "round":  # documents[rank::size], a loop's batch of them: objects that are all alike
        one = element(m, term.parts[0], file, line)
        if _is_object(one):
            return one
    if term.op == "call" and term.called == "chain" and term.parts and term.receiver is None:
        found = [element(m, part, file, line) for part in term.parts[:8]]
        return found[0] if len(found) == 1 else Term("merge", tuple(found), None, file, line)
    if term.op == "object":
        found_call = calls.method(m, term, "__iter__", [], file, line)
        if found_call is not None and found_call is not term:
            return element(m, found_call, file, line)
        following = objects.following(m, term, file, line)
        if following is not None:
            return following
        found_call = calls.method(m, term, "__getitem__", [Term("free", (), "index", file, line)], file, line)
        if found_call is not None:
            return found_call
        within = objects.held(term)
        if within is not None:
            return element(m, within, file, line)
    return Term("each", (term,), None, file, line)


_TABLES = frozenset(("dict.fromkeys", "collections.defaultdict", "collections.Counter", "collections.OrderedDict"))


def _keys(term: Term) -> list[Term] | None:
    """What a table has been filled under, `table[key] = value`; None of what was made as no table."""
    found: dict[int, Term] = {}
    waiting, seen = [term], set[int]()
    while waiting and len(seen) < 200:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if one.op == "store" and one.value is None:
            found[id(one.parts[1])] = one.parts[1]
            waiting.append(one.parts[0])
        elif one.op in ("merge", "round"):
            waiting.extend(one.parts)
        elif one.op == "choice":
            waiting.extend(one.parts[1:])
        elif one.op == "dict" and one.value != "comp":
            found.update((id(key), key) for key in one.parts[::2])
        elif not (one.op == "call" and one.value in _TABLES):
            return None
    return [*found.values()][:24]


def _is_object(term: Term, depth: int = 4) -> bool:
    """Whether it is an object of the script, whichever of several."""
    if term.op in ("merge", "choice") and depth:
        return all(_is_object(part, depth - 1) for part in (term.parts[1:] if term.op == "choice" else term.parts))
    return term.op == "object"


# What gives the elements of what it was given, one by one.
_PICKING = frozenset(("filter", "takewhile", "dropwhile", "filterfalse"))
_PASSING = frozenset(
    """tqdm reversed sorted list tuple iter deque ModuleList meter track as_completed islice cycle DataLoader
    from_iterable sample shuffle""".split()  # noqa: SIM905
)


def _grown(term: Term, depth: int = 12) -> tuple[Term, Term] | None:
    """(list before, what was added to it) of a list that was added to in each arm of a choice."""
    if term.op == "mutate" and term.value in (".append", ".add") and len(term.parts) == 2:
        return term.parts[0], term.parts[1]
    if term.op != "choice" or not depth:
        return None
    first, second = _grown(term.parts[1], depth - 1), _grown(term.parts[2], depth - 1)
    if first is None or second is None or first[0] is not second[0]:
        return None
    return first[0], Term("choice", (term.parts[0], first[1], second[1]), None, term.file, term.line)


def fresh(term: Term, number: int) -> Term:
    """A loop's element as that of one round: what an earlier round's element left behind is not the same value."""
    if term.op == "tuple":
        return Term("tuple", tuple(fresh(part, number) for part in term.parts), None, term.file, term.line)
    if term.op == "each":
        return Term("each", term.parts, number, term.file, term.line)
    return term if _is_solid(term) else Term("round", (term,), number, term.file, term.line)


def _is_solid(term: Term, depth: int = 4) -> bool:
    """Whether it, or one of those that it may be, is the same in every round, or knows itself what changes."""
    several = term.op in ("choice", "merge") and depth > 0
    return term.op in _SOLID or (several and any(_is_solid(part, depth - 1) for part in term.parts))


_SOLID = frozenset(
    ("const", "object", "function", "class", "bound", "namespace", "name", "super", "list", "dict", "text")
)


def spelt_items(term: Term) -> tuple[Term, ...] | None:
    """The elements of a short tuple, list or table that is written out, of what was stacked; None for anything else."""
    term = objects.held(term) or _stacked(term) or term
    side_by_side = _fields(term) or _zipped(term)
    if side_by_side is not None:
        return side_by_side if 0 < len(side_by_side) <= _SHORT else None
    for _ in range(40):
        if term.op in ("store", "merge") and term.parts and term.value is None:
            term = term.parts[0]
    if term.op == "dict" and term.value != "comp" and 0 < len(term.parts) <= 2 * _SHORT:
        keys = term.parts[::2]
        return keys if all(key.op == "const" for key in keys) else None
    if term.op == "const" and isinstance(term.value, (tuple, list)):  # "seed=1337 depth=11".split()
        listed: tuple[Term, ...] | None = tuple(constant(one, term.file, term.line) for one in term.value[:_DEFAULTS])
    else:
        listed = _table_items(term) or listing(term)
    if listed is None or not listed:
        return None
    called = all(part.op in ("function", "bound", "class") for part in listed)
    most = _CALLED if called else _DEFAULTS if all(map(_is_default, listed)) else _SHORT
    return listed if len(listed) <= most else None


def _fields(term: Term) -> tuple[Term, ...] | None:
    """What a named tuple holds, in order; of several of one kind, of which a value is one, each field of any."""
    options = alternatives(term, 8) if term.op in ("merge", "choice", "object") else []
    if not options or any(one.op != "object" or one.value.kind is not options[0].value.kind for one in options):
        return None
    kind = options[0].value.kind
    if not any(base.rsplit(".", 1)[-1] == "NamedTuple" for base in kind.outside):
        return None
    names = kind.all_fields()
    if any(name not in one.value.attrs for one in options for name in names):
        return None
    held = [[one.value.attrs[name] for one in options] for name in names]
    return tuple(each[0] if len(each) == 1 else Term("merge", tuple(each), None, term.file, term.line) for each in held)


def _zipped(term: Term) -> tuple[Term, ...] | None:
    """zip(a, b) of named tuples: their fields two by two."""
    if term.op != "call" or term.called != "zip" or not all(key in (0, 1, 2, 3) for key in term.keys):
        return None
    sides = [_fields(part) for part in term.parts]
    rows = [side for side in sides if side is not None]
    if len(rows) != len(sides) or not rows or len({len(side) for side in rows}) != 1:
        return None
    return tuple(Term("tuple", row, None, term.file, term.line) for row in zip(*rows, strict=True))


def _stacked(term: Term) -> Term | None:
    """torch.stack((nats, tokens, size)).tolist(), torch.tensor([nats, tokens])"""
    below = peel(term)
    if below.called == "stack" and below.argument(1, "dim", "axis") is None:
        listed = below.operand("tensors", "arrays")
        below = peel(listed) if listed is not None else below
    return below if below is not term and below.op in ("tuple", "list") and below.value != "comp" else None


_SHORT = 6
_CALLED = 24  # stages, hooks, rules: what a list of functions does is done in turn
_DEFAULTS = 400  # settings: a name and its default


def _is_default(term: Term) -> bool:
    """("DEPTH", 11), ("depth", "DEPTH", int, 11), "depth=11": a name, and what it is when nothing else is said."""
    if term.op == "const" and isinstance(term.value, str):
        return is_setting(term.value)
    if term.op != "tuple" or len(term.parts) < 2 or not isinstance(term.parts[0].constant(), str):
        return False
    return all(_is_constant(part) or part.op in ("name", "function", "class") for part in term.parts[1:])


def _is_constant(term: Term) -> bool:
    return term.op == "const" or (term.op in ("tuple", "list") and all(map(_is_constant, term.parts)))


def _table_items(term: Term) -> tuple[Term, ...] | None:
    """The pairs, keys or values of a table that is written out."""
    if term.op != "call" or term.value not in (".items", ".keys", ".values") or term.receiver is None:
        return None
    table = entries(term.receiver)
    if table is None:
        return None
    if term.value == ".items":
        pairs = ((constant(key, term.file, value.line), value) for key, value in table.items())
        return tuple(Term("tuple", pair, None, term.file, term.line) for pair in pairs)
    return tuple(table.values()) if term.value == ".values" else tuple(constant(key) for key in table)


def entries(term: Term) -> dict[str | int, Term] | None:
    """A table with constant keys: written out, or filled key by key in the open; None for anything else."""
    added: list[dict[str | int, Term]] = []
    term = objects.held(term) or term
    while len(added) < _DEFAULTS:
        if term.op == "store" and term.value is None and _is_word(term.parts[1]):
            added.append({term.parts[1].value: term.parts[2]})
        elif term.op == "mutate" and term.value == ".update" and term.keys == ("self", 0):
            more = entries(term.parts[1])
            if more is None:
                return None
            added.append(more)
        else:
            break
        term = term.parts[0]
    if term.op != "dict" or term.value == "comp" or not all(map(_is_word, term.parts[::2])):
        return None
    table = {key.value: value for key, value in zip(term.parts[::2], term.parts[1::2], strict=False)}
    for one in reversed(added):
        table.update(one)
    return table


def _is_word(key: Term) -> bool:
    return key.op == "const" and isinstance(key.value, (str, int))


def listing(term: Term, depth: int = 64) -> tuple[Term, ...] | None:
    """The elements of a list that is written out, or was filled step by step in the open; None for anything else."""
    term = objects.held(term) or term
    if term.op in ("tuple", "list") and term.value != "comp":
        return term.parts
    if term.op != "mutate" or not depth or term.value not in (".append", ".insert", ".extend"):
        return None
    before = listing(term.parts[0], depth - 1)
    if before is None:
        return None
    if term.value == ".append" and len(term.parts) == 2:
        return (*before, term.parts[1])
    if term.value == ".extend" and len(term.parts) == 2:
        more = listing(term.parts[1], depth - 1)
        return None if more is None else (*before, *more)
    where = term.parts[1].constant() if len(term.parts) == 3 else None
    return (*before[:where], term.parts[2], *before[where:]) if isinstance(where, int) else None


def _empty(term: Term) -> bool:
    return term.op in ("list", "tuple", "set", "dict") and not term.parts
