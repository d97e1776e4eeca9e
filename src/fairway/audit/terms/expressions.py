"""Expressions as terms."""

import ast
from typing import TYPE_CHECKING, Any

from fairway.audit.settings import BINARY, COMPARE, UNKNOWN, attempt, small
from fairway.audit.terms import calls
from fairway.audit.terms.term import Term
from fairway.audit.terms.things import Bound, Frame, Function, FunctionNode, constant

if TYPE_CHECKING:
    from fairway.audit.terms.machine import Machine

_SIGNS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.MatMult: "@",
}
_TESTS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}


def value(m: "Machine", node: ast.expr | None, frame: Frame) -> Term:
    """The term of an expression."""
    if node is None:
        return constant(None, frame.file)
    m.steps += 1
    if m.active:
        key = id(m.active[-1])
        m.own_steps[key] = m.own_steps.get(key, 0) + 1
    if isinstance(node, ast.Constant):
        return Term("const", (), node.value, frame.file, node.lineno)
    if isinstance(node, ast.Name):
        return name(node.id, frame, node.lineno)
    handler = _HANDLERS.get(type(node))
    return handler(m, node, frame) if handler else Term("free", (), type(node).__name__, frame.file, node.lineno)


def name(word: str, frame: Frame, line: int) -> Term:
    at: Frame | None = frame.elsewhere.get(word, frame)
    while at is not None:
        if word in at.vars:
            return at.vars[word]
        at = at.outer
    return Term("name", (), word, frame.file, line)


def function(m: "Machine", node: FunctionNode, frame: Frame) -> Term:
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    defaults = {
        n: value(m, d, frame)
        for n, d in zip(names[len(names) - len(arguments.defaults) :], arguments.defaults, strict=True)
    }
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            defaults[argument.arg] = value(m, default, frame)
    made = Function(node, frame, defaults)
    for decorator in getattr(node, "decorator_list", ()):
        word = decorator.attr if isinstance(decorator, ast.Attribute) else getattr(decorator, "id", "")
        made.static = made.static or word == "staticmethod"
        made.bound_class = made.bound_class or word == "classmethod"
        made.computed = made.computed or word in ("property", "cached_property")
    return Term("function", (), made, frame.file, node.lineno)


# ---- operations

_SOMETHING = frozenset(("object", "function", "class", "bound", "list", "tuple", "dict", "set", "text", "op"))


def operation(m: "Machine", op: ast.operator, left: Term, right: Term, file: str, line: int) -> Term:
    if left.op == "const" and right.op == "const" and type(op) in BINARY and small(op, left.value, right.value):
        folded = attempt(BINARY[type(op)], left.value, right.value)
        if folded is not UNKNOWN:
            return Term("const", (left, right), folded, file, line)
    if (
        isinstance(op, ast.Add)
        and left.op == right.op
        and left.op in ("list", "tuple")
        and "comp"
        not in (
            left.value,
            right.value,
        )
    ):
        return Term(left.op, left.parts + right.parts, None, file, line)
    return Term("op", (left, right), _SIGNS[type(op)], file, line)


def _binary(m: "Machine", node: Any, frame: Frame) -> Term:
    return operation(m, node.op, value(m, node.left, frame), value(m, node.right, frame), frame.file, node.lineno)


def _unary(m: "Machine", node: Any, frame: Frame) -> Term:
    operand = value(m, node.operand, frame)
    if isinstance(node.op, ast.Not):
        held = m.holds(operand)
        if held is not None:
            return Term("const", (operand,), not held, frame.file, node.lineno)
        return Term("op", (operand,), "not", frame.file, node.lineno)
    word = {ast.USub: "neg", ast.UAdd: "pos", ast.Invert: "~"}[type(node.op)]
    if operand.op == "const":
        folded = attempt(lambda v: -v if word == "neg" else (+v if word == "pos" else ~v), operand.value)
        if folded is not UNKNOWN:
            return Term("const", (operand,), folded, frame.file, node.lineno)
    return Term("op", (operand,), word, frame.file, node.lineno)


def _boolean(m: "Machine", node: Any, frame: Frame) -> Term:
    """Parts that decide nothing are left out; a part that decides ends it."""
    decisive = isinstance(node.op, ast.Or)
    undecided: list[Term] = []
    for part in node.values:
        term = value(m, part, frame)
        held = m.holds(term)
        if held is decisive:
            if not undecided:
                return term
            if not decisive:
                return Term("const", (*undecided, term), False, frame.file, node.lineno)
            undecided.append(term)
            break
        if held is None or part is node.values[-1]:
            undecided.append(term)
    if len(undecided) == 1:
        return undecided[0]
    return Term("op", tuple(undecided), "or" if decisive else "and", frame.file, node.lineno)


def _compare(m: "Machine", node: Any, frame: Frame) -> Term:
    terms = [value(m, part, frame) for part in (node.left, *node.comparators)]
    held: list[Term] = []
    for left, op, right in zip(terms, node.ops, terms[1:], strict=False):
        held.append(compared(m, op, left, right, frame.file, node.lineno))
    if len(held) == 1:
        return held[0]
    if any(m.holds(one) is False for one in held):
        return Term("const", tuple(held), False, frame.file, node.lineno)
    if all(m.holds(one) for one in held):
        return Term("const", tuple(held), True, frame.file, node.lineno)
    return Term("op", tuple(held), "and", frame.file, node.lineno)


def compared(m: "Machine", op: ast.cmpop, left: Term, right: Term, file: str, line: int) -> Term:
    if left.op == "const" and right.op == "const":
        folded = attempt(COMPARE[type(op)], left.value, right.value)
        if folded is not UNKNOWN:
            return Term("const", (left, right), bool(folded), file, line)
    if isinstance(op, (ast.Is, ast.IsNot)) and _nothing(right) and left.op in _SOMETHING:
        return Term("const", (left, right), isinstance(op, ast.IsNot), file, line)
    if (
        isinstance(op, (ast.In, ast.NotIn))
        and right.op == "name"
        and right.value == "os.environ"
        and left.op == "const"
    ):
        told = m.settings.environ(left.value, None)
        if told is not UNKNOWN:
            return Term("const", (left, right), (told is not None) == isinstance(op, ast.In), file, line)
    return Term("compare", (left, right), _TESTS[type(op)], file, line)


def _choice(m: "Machine", node: Any, frame: Frame) -> Term:
    test = value(m, node.test, frame)
    held = m.holds(test)
    if held is not None:
        return value(m, node.body if held else node.orelse, frame)
    return Term(
        "choice",
        (test, value(m, node.body, frame), value(m, node.orelse, frame)),
        None,
        frame.file,
        node.lineno,
    )


# ---- containers


def _sequence(m: "Machine", node: Any, frame: Frame) -> Term:
    parts: list[Term] = []
    for part in node.elts[:4096]:
        if isinstance(part, ast.Starred):
            term = value(m, part.value, frame)
            parts.extend(
                term.parts
                if term.op in ("list", "tuple") and term.value != "comp"
                else (element(m, term, frame.file, node.lineno),)
            )
        else:
            parts.append(value(m, part, frame))
    op = {ast.Tuple: "tuple", ast.List: "list", ast.Set: "set"}[type(node)]
    if op != "list" and parts and all(part.op == "const" for part in parts):
        folded = attempt({"tuple": tuple, "set": frozenset}[op], [part.value for part in parts])
        if folded is not UNKNOWN and op == "set":
            return Term("const", tuple(parts), folded, frame.file, node.lineno)
    return Term(op, tuple(parts), None, frame.file, node.lineno)


def _mapping(m: "Machine", node: Any, frame: Frame) -> Term:
    parts: list[Term] = []
    for key, item_value in zip(node.keys[:2048], node.values, strict=False):
        if key is None:
            inner = value(m, item_value, frame)
            parts.extend(
                inner.parts if inner.op == "dict" else (Term("free", (), "**", frame.file, node.lineno), inner)
            )
        else:
            parts.extend((value(m, key, frame), value(m, item_value, frame)))
    return Term("dict", tuple(parts), None, frame.file, node.lineno)


def _comprehension(m: "Machine", node: Any, frame: Frame) -> Term:
    inside = Frame(frame.file, outer=frame, depth=frame.depth)
    spelt = _spelt_out(m, node, frame, inside)
    if spelt is not None:
        return spelt
    tests: list[Term] = []
    for generator in node.generators:
        source = value(m, generator.iter, inside)
        m.assign(generator.target, element(m, source, frame.file, node.lineno), inside)
        tests.extend(value(m, test, inside) for test in generator.ifs)
    open_tests = [test for test in tests if m.holds(test) is None]
    if isinstance(node, ast.DictComp):
        pair = (value(m, node.key, inside), value(m, node.value, inside))
        return Term("dict", _under(open_tests, pair), "comp", frame.file, node.lineno)
    parts = (value(m, node.elt, inside),)
    op = "set" if isinstance(node, ast.SetComp) else "list"
    return Term(op, _under(open_tests, parts), "comp", frame.file, node.lineno)


def _spelt_out(m: "Machine", node: Any, frame: Frame, inside: Frame) -> Term | None:
    """A comprehension over a few things that are written out: each of its elements by itself."""
    if len(node.generators) != 1 or node.generators[0].ifs or isinstance(node, ast.DictComp):
        return None
    source = value(m, node.generators[0].iter, inside)
    if source.op not in ("list", "tuple") or source.value == "comp" or not 1 < len(source.parts) <= 12:
        return None
    parts = []
    for part in source.parts:
        m.assign(node.generators[0].target, part, inside)
        parts.append(value(m, node.elt, inside))
    return Term("set" if isinstance(node, ast.SetComp) else "list", tuple(parts), None, frame.file, node.lineno)


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


def _under(tests: list[Term], parts: tuple[Term, ...]) -> tuple[Term, ...]:
    """Elements that are taken under conditions: the condition is part of how they came to be."""
    for test in tests:
        parts = (*parts[:-1], Term("choice", (test, parts[-1], constant(None)), "filter", test.file, test.line))
    return parts


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
    if term.op in ("merge", "choice"):
        options = [p for p in (term.parts[1:] if term.op == "choice" else term.parts) if not _empty(p)]
        found = [element(m, option, file, line) for option in options[:8]]
        if len(found) == 1:
            return found[0]
        if found:
            return Term("merge", tuple(found), None, file, line)
    if term.op == "call" and term.called in (
        "tqdm",
        "reversed",
        "list",
        "tuple",
        "iter",
        "trange",
        "deque",
        "ModuleList",
        "meter",
    ):
        below = term.argument(0)
        if below is not None and term.called != "trange":
            return element(m, below, file, line)
    if term.op == "object":
        found_call = calls.method(m, term, "__iter__", [], file, line)
        if found_call is not None:
            return element(m, found_call, file, line)
        found_call = calls.method(m, term, "__getitem__", [Term("free", (), "index", file, line)], file, line)
        if found_call is not None:
            return found_call
    return Term("each", (term,), None, file, line)


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
    if term.op in ("tuple", "list") and term.value != "comp" and 0 < len(term.parts) <= _SHORT:
        return term.parts
    if term.op == "dict" and term.value != "comp" and 0 < len(term.parts) <= 2 * _SHORT:
        keys = term.parts[::2]
        return keys if all(key.op == "const" for key in keys) else None
    return None


_SHORT = 6


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


_SEEN_THROUGH = frozenset(("choice", "merge", "store", "call", "round"))


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
    if base.op == "store" and isinstance(key, int) and base.value is None:
        where = base.parts[1].value if base.parts[1].op == "const" else UNKNOWN
        if isinstance(where, int):
            return base.parts[2] if where == key else item(m, base.parts[0], index, file, line)
    if base.op == "store" and index.op != "const" and base.parts[2].op == "object":
        one = base.parts[2]
        other = item(m, base.parts[0], index, file, line) if base.parts[0].op == "store" else one
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
    if base.op == "name" and base.value == "os.environ":
        return m.environ(index, Term("free", (), "no default", file, line), file, line)
    if base.op == "object":
        looked = calls.method(m, base, "__getitem__", [index], file, line)
        if looked is not None:
            return looked
    return Term("item", (base, index), None, file, line)


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


def _subscript(m: "Machine", node: Any, frame: Frame) -> Term:
    base = value(m, node.value, frame)
    return item(m, base, value(m, node.slice, frame), frame.file, node.lineno)


def _slice(m: "Machine", node: Any, frame: Frame) -> Term:
    parts = tuple(value(m, part, frame) for part in (node.lower, node.upper, node.step))
    return Term("slice", parts, None, frame.file, getattr(node, "lineno", 0))


def _joined(m: "Machine", node: Any, frame: Frame) -> Term:
    parts = tuple(value(m, part.value if isinstance(part, ast.FormattedValue) else part, frame) for part in node.values)
    if all(part.op == "const" for part in parts) and all(
        not isinstance(part, ast.FormattedValue) or (part.format_spec is None and part.conversion == -1)
        for part in node.values
    ):
        return Term("const", parts, "".join(str(part.value) for part in parts)[:100_000], frame.file, node.lineno)
    return Term("text", parts, None, frame.file, node.lineno)


# ---- names with a dot


def _attribute(m: "Machine", node: Any, frame: Frame) -> Term:
    return attribute(m, value(m, node.value, frame), node.attr, frame.file, node.lineno)


def attribute(m: "Machine", base: Term, word: str, file: str, line: int) -> Term:
    if base.op == "object":
        if word in base.value.attrs:
            return base.value.attrs[word]
        found = base.value.kind.find(word)
        if found is None:
            return Term("attr", (base,), word, file, line)
        return _bound(m, found, base, base, file, line)
    if base.op == "class":
        found = base.value.find(word)
        return (
            _bound(m, found, None, base, file, line) if found is not None else Term("attr", (base,), word, file, line)
        )
    if base.op == "namespace":
        return base.value.vars.get(word, Term("name", (), word, file, line))
    if base.op == "name":
        return Term("name", (), f"{base.value}.{word}", file, line)
    if base.op == "super":
        kind, owner = base.value
        found = next((f for b in kind.bases if (f := b.find(word)) is not None), None)
        return (
            _bound(m, found, owner, owner, file, line) if found is not None else Term("attr", (base,), word, file, line)
        )
    if base.op in ("choice", "merge") and word not in ("shape", "device", "dtype"):
        options = [p for p in (base.parts[1:] if base.op == "choice" else base.parts) if not _nothing(p)]
        if any(p.op in ("object", "class") for p in options):
            found_terms = [attribute(m, p, word, file, line) for p in options[:6]]
            if all(t is found_terms[0] for t in found_terms):
                return found_terms[0]
            return (
                Term(base.op, (*base.parts[: len(base.parts) - len(options)][:1], *found_terms), None, file, line)
                if (base.op == "choice" and len(options) == 2)
                else Term("merge", tuple(found_terms), None, file, line)
            )
    if base.op == "store" and base.value == "attr" and base.parts[1].value == "." + word:
        return base.parts[2]
    if base.op == "call" and base.value in ("min", "max") and base.parts:
        one = element(m, base.parts[0], file, line)
        if one.op in ("object", "merge", "choice"):
            return attribute(m, one, word, file, line)
    if base.op == "call" and base.called == "parse_args" and word in m.options:
        return m.options[word]
    return Term("attr", (base,), word, file, line)


def _nothing(term: Term) -> bool:
    return term.op == "const" and term.value is None


def _bound(m: "Machine", found: Term, owner: Term | None, base: Term, file: str, line: int) -> Term:
    """A class's name as its object sees it: a method knows its owner, a property is computed."""
    if found.op != "function":
        return found
    made: Function = found.value
    if made.computed and owner is not None:
        return calls.enter(m, made, [owner], {}, Term("attr", (base,), made.name, file, line))
    if made.static or (owner is None and not made.bound_class):
        return found
    if made.bound_class and base.op == "object":
        return Term("bound", (), Bound(made, Term("class", (), base.value.kind, file, line)), file, line)
    return Term("bound", (), Bound(made, owner or base), file, line)


def _call(m: "Machine", node: Any, frame: Frame) -> Term:
    return calls.call(m, node, frame)


def _lambda(m: "Machine", node: Any, frame: Frame) -> Term:
    return function(m, node, frame)


def _named(m: "Machine", node: Any, frame: Frame) -> Term:
    term = value(m, node.value, frame)
    m.assign(node.target, term, frame)
    return term


def _starred(m: "Machine", node: Any, frame: Frame) -> Term:
    return value(m, node.value, frame)


def _yield(m: "Machine", node: Any, frame: Frame) -> Term:
    term = value(m, node.value, frame)
    if isinstance(node, ast.YieldFrom):
        term = element(m, term, frame.file, node.lineno)
    frame.yields.append(term)
    return Term("free", (), "sent", frame.file, node.lineno)


_HANDLERS: dict[type[ast.expr], Any] = {
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolean,
    ast.Compare: _compare,
    ast.IfExp: _choice,
    ast.Tuple: _sequence,
    ast.List: _sequence,
    ast.Set: _sequence,
    ast.Dict: _mapping,
    ast.ListComp: _comprehension,
    ast.SetComp: _comprehension,
    ast.GeneratorExp: _comprehension,
    ast.DictComp: _comprehension,
    ast.Subscript: _subscript,
    ast.Slice: _slice,
    ast.JoinedStr: _joined,
    ast.Attribute: _attribute,
    ast.Lambda: _lambda,
    ast.NamedExpr: _named,
    ast.Starred: _starred,
    ast.Await: _starred,
    ast.Yield: _yield,
    ast.YieldFrom: _yield,
    ast.Call: _call,
}
