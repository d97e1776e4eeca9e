"""What a container holds: one of its elements, the item at a place."""

from typing import TYPE_CHECKING, Any

from fairway.audit.settings import UNKNOWN, attempt
from fairway.audit.terms import calls, objects
from fairway.audit.terms.term import Term
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
    if term.op == "call" and term.called == "filter" and len(term.parts) == 2:
        return element(m, term.parts[1], file, line)
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
    return Term("each", (term,), None, file, line)


# What gives the elements of what it was given, one by one.
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
    if term.op in _SOLID or (term.op in ("choice", "merge") and any(part.op in _SOLID for part in term.parts)):
        return term
    return Term("round", (term,), number, term.file, term.line)


_SOLID = frozenset(
    ("const", "object", "function", "class", "bound", "namespace", "name", "super", "list", "dict", "text")
)


def spelt_items(term: Term) -> tuple[Term, ...] | None:
    """The elements of a short tuple, list or table that is written out; None for anything else."""
    for _ in range(40):
        if term.op in ("store", "merge") and term.parts and term.value is None:
            term = term.parts[0]
    if term.op == "dict" and term.value != "comp" and 0 < len(term.parts) <= 2 * _SHORT:
        keys = term.parts[::2]
        return keys if all(key.op == "const" for key in keys) else None
    listed = _table_items(term) or listing(term)
    if listed is None or not listed:
        return None
    called = all(part.op in ("function", "bound", "class") for part in listed)
    return listed if len(listed) <= (_CALLED if called else _SHORT) else None


_SHORT = 6
_CALLED = 24  # stages, hooks, rules: what a list of functions does is done in turn


def _table_items(term: Term) -> tuple[Term, ...] | None:
    """The pairs, keys or values of a table that is written out."""
    if term.op != "call" or term.value not in (".items", ".keys", ".values") or term.receiver is None:
        return None
    table = term.receiver
    if table.op != "dict" or table.value == "comp" or not all(key.op == "const" for key in table.parts[::2]):
        return None
    keys, values = table.parts[::2], table.parts[1::2]
    if term.value == ".items":
        pairs = zip(keys, values, strict=False)
        return tuple(Term("tuple", pair, None, term.file, term.line) for pair in pairs)
    return keys if term.value == ".keys" else values


def listing(term: Term, depth: int = 64) -> tuple[Term, ...] | None:
    """The elements of a list that is written out, or was filled step by step in the open; None for anything else."""
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


_HOLDERS = frozenset(
    (
        "tensor",
        "stack",
        "array",
        "as_tensor",
        "asarray",
        "tolist",
        "cpu",
        "double",
        "to",
        "numpy",
        "float",
        "tuple",
        "list",
    )
)


def item(m: "Machine", base: Term, index: Term, file: str, line: int) -> Term:
    """base[index], looked up where it is known."""
    if index.op != "const" or not isinstance(index.value, (int, str)) or base.op not in _SEEN_THROUGH:
        return _item(m, base, index, file, line)
    key = (id(base), index.value)
    if key not in m.items:
        m.items[key] = (base, _item(m, base, index, file, line))  # the base is kept, so that its id stays its own
    return m.items[key][1]


_SEEN_THROUGH = frozenset(("choice", "merge", "store", "mutate", "call", "round"))


def _item(m: "Machine", base: Term, index: Term, file: str, line: int) -> Term:
    key = index.value if index.op == "const" else UNKNOWN
    if base.op == "list" and base.value == "comp" and isinstance(key, int):
        return element(m, base, file, line)
    listed = base.parts if base.op in ("tuple", "list") and base.value != "comp" else ()
    if isinstance(key, int) and -len(listed) <= key < len(listed):
        return listed[key]
    if base.op == "dict" and base.value != "comp" and key is not UNKNOWN:
        for at in range(0, len(base.parts), 2):
            if base.parts[at].op == "const" and base.parts[at].value == key:
                return base.parts[at + 1]
    if base.op == "const" and key is not UNKNOWN:
        folded = attempt(lambda: base.value[key])
        if folded is not UNKNOWN:
            return Term("const", (base,), folded, file, line)
    if base.op == "store" and isinstance(key, str) and base.parts[1].op == "const":
        return base.parts[2] if base.parts[1].value == key else item(m, base.parts[0], index, file, line)
    if base.op == "mutate" and base.value == ".update" and isinstance(key, str):
        return _updated(m, base, index, file, line)
    if base.op == "store" and isinstance(key, int) and base.value is None:
        where = base.parts[1].value if base.parts[1].op == "const" else UNKNOWN
        if isinstance(where, int):
            return base.parts[2] if where == key else item(m, base.parts[0], index, file, line)
    if base.op == "dict" and base.value != "comp" and index.op != "const":
        values = base.parts[1::2]
        if values and all(part.op in _THINGS for part in values):  # one of the things in a register
            return values[0] if len(values) == 1 else Term("merge", values[:24], None, file, line)
    if base.op == "store" and index.op != "const" and base.parts[2].op in _THINGS:
        one = base.parts[2]
        below = base.parts[0]
        other = (
            item(m, below, index, file, line) if below.op == "store" or (below.op == "dict" and below.parts) else one
        )
        return one if other is one else Term("merge", (other, one), None, file, line)
    if base.op == "call" and isinstance(key, int) and base.called in _HOLDERS:
        held = base.operand("data", "a", "tensors")
        if held is not None and (held.op != "call" or held.called in _HOLDERS):
            return item(m, held, index, file, line)
    if base.op == "call" and base.value in ("reversed", "sorted") and isinstance(key, int) and base.parts:
        return element(m, base.parts[0], file, line)
    if base.op == "call" and base.value in ("min", "max") and index.op == "const" and base.parts:
        one = element(m, base.parts[0], file, line)
        if one.op != "each":
            return Term(
                "call", (item(m, one, index, file, line), *base.parts[1:]), base.value, base.file, base.line, base.keys
            )
    if base.op == "round" and index.op == "const":
        inner = item(m, base.parts[0], index, file, line)
        return fresh(inner, base.value) if inner.op != "item" else Term("item", (base, index), None, file, line)
    if base.op == "choice" and index.op == "const":
        first, second = (item(m, part, index, file, line) for part in base.parts[1:])
        return first if first is second else Term("choice", (base.parts[0], first, second), base.value, file, line)
    if base.op == "merge" and index.op == "const" and len(base.parts) <= 8:
        return Term("merge", tuple(item(m, part, index, file, line) for part in base.parts), None, file, line)
    if base.op == "each" and base.parts[0].op == "call" and index.op == "const":
        paired = _paired(m, base.parts[0], index.value, file, line)
        if paired is not None:
            return paired
    if base.op == "op" and base.value == "+" and isinstance(key, int) and any(_is_packed(p) for p in base.parts):
        sides = tuple(item(m, part, index, file, line) for part in base.parts)
        return Term("op", sides, "+", base.file, base.line)
    if base.op == "call" and base.called == "sum" and isinstance(key, int):  # of a stack of packed sums, over the rows
        held = base.operand()
        if held is not None and held.called in ("stack", "vstack") and held.parts:
            row = element(m, held.parts[0], file, line)
            column = item(m, row, index, file, line)
            return Term("call", (column,), base.value, base.file, base.line, ("self",))
    if base.op == "name" and base.value == "os.environ":
        return m.environ(index, Term("free", (), "no default", file, line), file, line)
    if base.op == "object":
        looked = calls.method(m, base, "__getitem__", [index], file, line)
        if looked is not None:
            return looked
    return Term("item", (base, index), None, file, line)


def _is_packed(term: Term) -> bool:
    """A few numbers in one tensor: tensor([nats, octets]), or a total of such."""
    if term.op == "call" and term.called in ("tensor", "array", "stack", "as_tensor"):
        held = term.operand("data", "a", "tensors", "object")
        return held is not None and held.op in ("list", "tuple") and held.value != "comp"
    if term.op == "op" and term.value == "+":
        return any(_is_packed(part) for part in term.parts)
    return term.op == "merge" and any(_is_packed(part) for part in term.parts)


def _updated(m: "Machine", base: Term, index: Term, file: str, line: int) -> Term:
    """table.update(name=value)[name]; a Counter's update adds."""
    said = base.argument(str(index.value))
    given = base.argument(0)
    if said is None and given is not None and given.op in ("dict", "store", "merge", "choice"):
        found = item(m, given, index, file, line)
        said = found if found.op != "item" else None
    before = item(m, base.parts[0], index, file, line)
    if said is None:
        return before
    counts = any(one.called == "Counter" for one in layers(base))
    return Term("op", (before, said), "+", base.file, base.line) if counts else said


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


_THINGS = frozenset(("object", "function", "class", "bound"))


def _paired(m: "Machine", term: Term, index: Any, file: str, line: int) -> Term | None:
    """Component of an element of enumerate, zip or a table's items."""
    if term.value == "enumerate" and index == 1 and term.parts:
        return element(m, term.parts[0], file, line)
    if term.value == "zip" and len(term.parts) == 1 and isinstance(index, int):
        column = item(m, element(m, term.parts[0], file, line), constant(index, file, line), file, line)
        return Term("list", (column,), "comp", file, line)
    if term.value == "zip" and isinstance(index, int) and index in term.keys[index : index + 1]:
        return element(m, term.parts[index], file, line)
    if term.value == ".items" and index in (0, 1):
        base = term.parts[0]
        if base.op == "dict" and base.parts:
            return Term("merge", base.parts[index::2][:64], None, file, line)
    return None


def transposed(m: "Machine", rows: Term, file: str, line: int) -> Term | None:
    """zip(*rows) of rows that are tuples: their columns."""
    one = element(m, rows, file, line)
    width = _width(one)
    if width == 0:
        return None
    columns = (item(m, one, constant(i, file, line), file, line) for i in range(width))
    return Term("list", tuple(Term("list", (column,), "comp", file, line) for column in columns), None, file, line)


def _width(term: Term) -> int:
    if term.op == "tuple":
        return len(term.parts)
    if term.op in ("choice", "merge"):
        return max((_width(part) for part in term.parts[-4:]), default=0)
    return 0
