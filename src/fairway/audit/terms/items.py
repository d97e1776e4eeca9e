"""The item at a place of a container."""

from typing import TYPE_CHECKING, Any

from fairway.audit.settings import UNKNOWN, attempt
from fairway.audit.terms import calls, objects
from fairway.audit.terms.elements import element, fresh
from fairway.audit.terms.term import Term, alternatives, layers
from fairway.audit.terms.things import constant

if TYPE_CHECKING:
    from fairway.audit.terms.machine import Machine

_HOLDERS = frozenset(
    ("tensor", "stack", "array", "as_tensor", "asarray", "tolist", "cpu", "double", "to", "numpy", "float", "tuple",
     "list", "clone", "detach", "copy")
)  # fmt: skip


_JOINING = frozenset(("cat", "concatenate", "concat", "hstack"))
_ONE_OF = frozenset(("view", "reshape", "unsqueeze", "expand_dims", "atleast_1d", "flatten"))


def item(m: "Machine", base: Term, index: Term, file: str, line: int) -> Term:
    """base[index], looked up where it is known."""
    if index.op != "const" or not isinstance(index.value, (int, str)) or base.op not in _SEEN_THROUGH:
        return _item(m, base, index, file, line)
    key = (id(base), index.value)
    if key not in m.items:
        m.items[key] = (base, _item(m, base, index, file, line))  # the base is kept, so that its id stays its own
    return m.items[key][1]


_SEEN_THROUGH = frozenset(("choice", "merge", "store", "mutate", "call", "round"))


def _rolled(base: Term) -> tuple[Term, int] | None:
    """(tokens, 1) of tokens.roll(-1): what stands at a place there stands one further in the tokens."""
    if base.op != "call" or base.called != "roll" or base.argument("dims", "axis", 2) is not None:
        return None
    held = base.operand("a")
    by = base.argument("shifts", "shift", 0 if base.receiver is not None else 1)
    shift = by.constant() if by is not None else None
    return (held, -shift) if held is not None and type(shift) is int else None


def _item(m: "Machine", base: Term, index: Term, file: str, line: int) -> Term:
    key = index.value if index.op == "const" else UNKNOWN
    rolled = _rolled(base) if index.op != "slice" else None
    if rolled is not None:
        shifted = Term("op", (index, constant(rolled[1], file, line)), "+", file, line)
        return Term("item", (rolled[0], shifted), None, file, line)
    if base.op == "list" and base.value == "comp" and isinstance(key, int):
        return _of_each(m, element(m, base, file, line), index, file, line) or element(m, base, file, line)
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
    if base.op in ("dict", "list") and index.op not in ("const", "slice"):  # one of a register, of the rows of a batch
        found = _one_of_things(m, base, file, line)
        if found is not None:
            return found
    if base.op == "store" and index.op != "const" and base.parts[2].op in _THINGS:
        one = base.parts[2]
        below = base.parts[0]
        other = (
            item(m, below, index, file, line) if below.op == "store" or (below.op == "dict" and below.parts) else one
        )
        return one if other is one else Term("merge", (other, one), None, file, line)
    if base.op == "call" and isinstance(key, int) and base.called in _JOINING:
        numbers = _joined(base)
        if -len(numbers) <= key < len(numbers):
            return numbers[key]
    if base.op == "call" and isinstance(key, int) and base.called == "unbind" and base.argument("dim", 0) is None:
        held = base.operand("input", "a")
        return item(m, held, index, file, line) if held is not None else Term("item", (base, index), None, file, line)
    if base.op == "call" and isinstance(key, int) and base.called in _HOLDERS:
        held = base.operand("data", "a", "tensors")
        summed = held is not None and (_packed_rows(held) is not None or _table_of_sums(held) is not None)
        if held is not None and (held.op != "call" or held.called in _HOLDERS | _JOINING or summed):
            return item(m, held, index, file, line)
    if base.op == "call" and base.value in ("reversed", "sorted") and isinstance(key, int) and base.parts:
        return element(m, base.parts[0], file, line)
    if base.op == "call" and base.value in ("min", "max") and index.op == "const" and base.parts:
        one = element(m, base.parts[0], file, line)
        if one.op != "each":
            held = item(m, one, index, file, line)
            if index.value != 0 and "key" not in base.keys:  # tuples are compared by their first part: this comes along
                return held
            return Term("call", (held, *base.parts[1:]), base.value, base.file, base.line, base.keys)
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
    if base.op == "op" and base.value == "+" and isinstance(key, int) and any(map(_has_columns, base.parts)):
        sides = tuple(item(m, part, index, file, line) for part in base.parts)
        return Term("op", sides, "+", base.file, base.line)
    if base.op == "call" and base.called == "sum" and isinstance(key, int):  # of a stack of packed sums, over the rows
        rows = _packed_rows(base)
        if rows is not None:
            column = item(m, element(m, rows, file, line), index, file, line)
            return Term("call", (column,), base.value, base.file, base.line, ("self",))
        table = _table_of_sums(base)
        if table is not None:
            return Term("call", (_column(table, key), *base.parts[1:]), base.value, base.file, base.line, base.keys)
    if base.op == "name" and base.value == "os.environ":
        return m.environ(index, Term("free", (), "no default", file, line), file, line)
    if base.op == "object" and isinstance(key, int):  # a named tuple's component
        fields = base.value.kind.all_fields()
        if -len(fields) <= key < len(fields) and fields[key] in base.value.attrs:
            return base.value.attrs[fields[key]]
    if base.op == "object":
        looked = calls.method(m, base, "__getitem__", [index], file, line)
        if looked is not None:
            return looked
        within = objects.held(base)
        if within is not None:
            return item(m, within, index, file, line)
    return Term("item", (base, index), None, file, line)


def _one_of_things(m: "Machine", base: Term, file: str, line: int) -> Term | None:
    """What a dict or a list holds where these are functions, classes or objects, whichever of them is asked for."""
    if base.value == "comp":
        held: tuple[Term, ...] = (element(m, base, file, line),) if base.op == "list" else ()
    else:
        held = base.parts[1::2] if base.op == "dict" else base.parts
    if not held or any(part.op not in _THINGS for part in held):
        return None
    return held[0] if len(held) == 1 else Term("merge", held[:_SEVERAL], None, file, line)


def _joined(base: Term) -> list[Term]:
    """nats, counts[0], counts[1] of cat((nats.view(1), tensor(counts))); nothing where a part may be longer."""
    listed = base.operand("tensors", "arrays", "a", "seq")
    found: list[Term] = []
    for part in (
        listed.parts if listed is not None and listed.op in ("tuple", "list") and listed.value != "comp" else ()
    ):
        held = part.operand("data", "object", "a", "tensors") if part.op == "call" else None
        if held is not None and part.called in ("tensor", "array", "as_tensor") and held.op in ("list", "tuple"):
            found += held.parts
        elif held is not None and part.called in _ONE_OF and _is_one(part):
            found.append(held)
        elif part.op == "item" and part.parts[1].op == "const" and part.parts[1].value is None:  # nats[None]
            found.append(part.parts[0])
        else:
            return []
    return found


def _is_one(part: Term) -> bool:
    """Whether a change of shape makes one number an array: view(1), reshape(1), unsqueeze(0)."""
    shape = [each.constant() for each in part.parts[1:]]
    return (
        part.called in ("atleast_1d",)
        or shape in ([1], [(1,)])
        or (part.called in ("unsqueeze", "expand_dims") and shape == [0])
    )


def _of_each(m: "Machine", term: Term, index: Term, file: str, line: int) -> Term | None:
    """float(v) of the v at a place, of `(float(v) for v in sums.tolist())`: what was stored there. None where no item
    of what it goes over is known."""
    if term.op == "each" and term.parts[0].op == "call" and term.parts[0].called in _HOLDERS | _JOINING:
        found = item(m, term.parts[0], index, file, line)
        return found if found.op != "item" or found.parts[0] is not term.parts[0] else None
    if term.op != "call" or len(term.parts) != 1:
        return None
    below = _of_each(m, term.parts[0], index, file, line)
    return Term("call", (below,), term.value, term.file, term.line, term.keys) if below is not None else None


def _has_columns(term: Term) -> bool:
    """A few numbers in one tensor, or the sums of a table's columns."""
    return _is_packed(term) or _table_of_sums(term) is not None


def _is_packed(term: Term) -> bool:
    """A few numbers in one tensor: tensor([nats, octets]), one that is filled by places, `sums[0] += nats`, or a total
    of such."""
    if term.op == "call" and term.called in ("tensor", "array", "stack", "as_tensor"):
        held = term.operand("data", "a", "tensors", "object")
        return held is not None and held.op in ("list", "tuple") and held.value != "comp"
    if term.op == "store" and term.value is None and type(term.parts[1].constant()) is int:
        return True
    if term.op == "op" and term.value == "+":
        return any(_is_packed(part) for part in term.parts)
    return term.op == "merge" and any(_is_packed(part) for part in term.parts)


def _packed_rows(total: Term) -> Term | None:
    """The rows that a sum adds up column by column: stack(rows).sum(0), sum of a list of packed numbers."""
    held = total.operand() if total.called == "sum" else None
    if held is None:
        return None
    if held.called in ("stack", "vstack") and held.parts:
        return held.parts[0]
    each = held.parts[0] if held.op == "list" and held.value == "comp" and held.parts else None
    return held if each is not None and any(_is_packed(one) for one in alternatives(each, 8)) else None


def _table_of_sums(total: Term) -> Term | None:
    """A table that was filled by row and column, `sums[chunk, 2] += nbytes`, of a sum over its rows."""
    axis = total.at(1, "dim", "axis") if total.called == "sum" else None
    held = total.operand("a") if axis is not None and axis.constant() == 0 else None
    waiting = [held] if held is not None else []
    for _ in range(_FEW):
        table = waiting.pop(0) if waiting else None
        if table is not None and table.op in ("merge", "choice"):
            waiting += table.parts[1:] if table.op == "choice" else table.parts
        elif table is not None and _column_in(table) is not None:
            return held
    return None


def _column_in(store: Term) -> int | None:
    """The column that a number is stored in."""
    index = store.parts[1] if store.op == "store" else None
    last = index.parts[-1].constant() if index is not None and index.op == "tuple" and len(index.parts) == 2 else None
    return last if type(last) is int else None


def _column(table: Term, key: int) -> Term:
    """A table without what was stored in other columns."""
    made: dict[int, Term] = {}
    waiting = [(table, False)]
    while waiting:
        term, done = waiting.pop()
        if id(term) in made:
            continue
        inner = term.parts[:1] if term.op == "store" else term.parts if term.op in ("merge", "choice") else ()
        if not done and inner:
            waiting.append((term, True))
            waiting.extend((part, False) for part in inner)
        elif term.op == "store":
            base, column = made[id(term.parts[0])], _column_in(term)
            kept = (base, term.parts[1], _added_to(base, term))
            other = column is not None and column != key
            made[id(term)] = base if other else Term("store", kept, term.value, term.file, term.line, term.keys)
        elif inner:
            parts = tuple(made.get(id(part), part) for part in inner)
            made[id(term)] = Term(term.op, parts, term.value, term.file, term.line, term.keys)
        else:
            made[id(term)] = term
    return made[id(table)]


_FEW = 16  # choices around one table
_SEVERAL = 24  # things in one register


def _added_to(table: Term, store: Term) -> Term:
    """What a store holds, where that is the place itself and something on top: with the place in this table."""
    value = store.parts[2]
    before = value.parts[0] if value.op == "op" and value.parts else value
    if before is value or before.op != "item" or before.parts[0] is not store.parts[0]:
        return value
    place = Term("item", (table, *before.parts[1:]), before.value, before.file, before.line, before.keys)
    return Term("op", (place, *value.parts[1:]), value.value, value.file, value.line, value.keys)


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
        put = [one.parts[1 + index] for one in layers(base) if one.op == "store" and len(one.parts) == 3]
        if put and any(one.op == "dict" and one.value != "comp" for one in layers(base)):
            return put[0] if len(put) == 1 else Term("merge", tuple(put[:64]), None, file, line)
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
    if term.op == "object":
        return len(term.value.kind.all_fields())
    if term.op in ("choice", "merge"):
        return max((_width(part) for part in term.parts[-4:]), default=0)
    return 0
