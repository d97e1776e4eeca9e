"""Expressions as terms."""

import ast
from typing import TYPE_CHECKING, Any

from fairway.audit.settings import BINARY, COMPARE, UNKNOWN, attempt, small
from fairway.audit.terms import assigning, calls, objects
from fairway.audit.terms.attributes import attribute, nothing
from fairway.audit.terms.elements import element, entries, listing, spelt_items
from fairway.audit.terms.items import item
from fairway.audit.terms.term import Term, peel
from fairway.audit.terms.things import Frame, Function, FunctionNode, constant

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


def operation(
    m: "Machine", op: ast.operator, left: Term, right: Term, file: str, line: int, in_place: bool = False
) -> Term:
    if left.op == "const" and right.op == "const" and type(op) in BINARY and small(op, left.value, right.value):
        folded = attempt(BINARY[type(op)], left.value, right.value)
        if folded is not UNKNOWN:
            return Term("const", (left, right), folded, file, line)
    own = objects.operated(m, op, left, right, file, line, in_place)
    if own is not None:
        return own
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
    if isinstance(op, ast.Sub) and (row := _made_whole(left, right)) is not None:
        return Term("call", (left, row), "torch.nn.functional.log_softmax", file, line, (0, 1))
    return Term("op", (left, right), _SIGNS[type(op)], file, line)


def _made_whole(left: Term, right: Term) -> Term | None:
    """The dimension over which z - z.logsumexp(-1, keepdim=True) is log_softmax(z)."""
    total = peel(right)
    held = total.operand("a") if total.called == "logsumexp" else None
    keeps = total is not right or peel(total.at(2, "keepdim", "keepdims") or total).constant() is True
    return total.at(1, "dim", "axis") if held is not None and keeps and peel(held) is peel(left) else None


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
    if isinstance(op, (ast.Is, ast.IsNot)) and nothing(right) and left.op in _SOMETHING:
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
    if isinstance(op, (ast.In, ast.NotIn)):
        inside = _is_registered(left, right)
        if inside is not None:
            return Term("const", (left, right), inside == isinstance(op, ast.In), file, line)
    term = Term("compare", (left, right), _TESTS[type(op)], file, line)
    if isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) and (_is_timed(left) or _is_timed(right)):
        m.clock(term)
    return term


def _is_registered(left: Term, right: Term) -> bool | None:
    """Whether a function stands in a list of functions that is written out; None where that cannot be told."""
    listed = listing(right)
    if not listed or not all(part.op == "function" for part in listed) or left.op not in ("function", "const"):
        return None
    return left.op == "function" and any(part.value is left.value for part in listed)


def _is_timed(term: Term, depth: int = 8) -> bool:
    """Whether a difference of times is in a sum or a product, or in a tensor that all ranks share."""
    term = peel(term)
    if term.op == "call" and term.called in _CLOCKS:
        return True
    open_ = term.op in ("op", "merge", "choice") or (term.op == "call" and term.called in ("float", "max", "min"))
    parts = term.parts[1:] if term.op == "choice" else term.parts[:2]
    return open_ and depth > 0 and any(_is_timed(part, depth - 1) for part in parts)


_CLOCKS = frozenset(("time", "perf_counter", "monotonic", "perf_counter_ns", "monotonic_ns"))


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
            known = entries(inner)
            if known is not None:
                parts.extend(part for k, v in known.items() for part in (constant(k, frame.file, v.line), v))
            else:
                parts.extend(
                    inner.parts if inner.op == "dict" else (Term("free", (), "**", frame.file, node.lineno), inner)
                )
        else:
            parts.extend((value(m, key, frame), value(m, item_value, frame)))
    return Term("dict", _last_of_each(parts), None, frame.file, node.lineno)


def _last_of_each(parts: list[Term]) -> tuple[Term, ...]:
    """Keys and values in turn; of a key that comes twice, {**defaults, **given}, the later value."""
    named = [key.value if key.op == "const" and isinstance(key.value, (str, int)) else None for key in parts[::2]]
    last = {name: at for at, name in enumerate(named)}
    kept = [at for at, name in enumerate(named) if name is None or last[name] == at]
    return tuple(part for at in kept for part in parts[2 * at : 2 * at + 2])


def _comprehension(m: "Machine", node: Any, frame: Frame) -> Term:
    inside = Frame(frame.file, outer=frame, depth=frame.depth)
    spelt = _spelt_out(m, node, frame, inside)
    if spelt is not None:
        return spelt
    tests: list[Term] = []
    for generator in node.generators:
        source = value(m, generator.iter, inside)
        assigning.assign(m, generator.target, element(m, source, frame.file, node.lineno), inside)
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
    if len(node.generators) != 1 or node.generators[0].ifs:
        return None
    source = value(m, node.generators[0].iter, inside)
    spelt = spelt_items(source)
    listed = source.parts if source.op in ("list", "tuple") and source.value != "comp" else spelt
    if listed is None or not 1 < len(listed) <= (len(spelt) if spelt is not None else 12):
        return None
    parts = []
    for part in listed:
        assigning.assign(m, node.generators[0].target, part, inside)
        if isinstance(node, ast.DictComp):
            parts.append(value(m, node.key, inside))
        parts.append(value(m, node.value if isinstance(node, ast.DictComp) else node.elt, inside))
    op = {ast.SetComp: "set", ast.DictComp: "dict"}.get(type(node), "list")
    return Term(op, tuple(parts), None, frame.file, node.lineno)


def _under(tests: list[Term], parts: tuple[Term, ...]) -> tuple[Term, ...]:
    """Elements that are taken under conditions: the condition is part of how they came to be."""
    for test in tests:
        parts = (*parts[:-1], Term("choice", (test, parts[-1], constant(None)), "filter", test.file, test.line))
    return parts


def _subscript(m: "Machine", node: Any, frame: Frame) -> Term:
    base = value(m, node.value, frame)
    return item(m, base, value(m, node.slice, frame), frame.file, node.lineno)


def _slice(m: "Machine", node: Any, frame: Frame) -> Term:
    parts = tuple(value(m, part, frame) for part in (node.lower, node.upper, node.step))
    return Term("slice", parts, None, frame.file, getattr(node, "lineno", 0))


def _joined(m: "Machine", node: Any, frame: Frame) -> Term:
    read = (value(m, part.value if isinstance(part, ast.FormattedValue) else part, frame) for part in node.values)
    parts = tuple(_spelt(m, part, frame.file, node.lineno) for part in read)
    if all(part.op == "const" for part in parts) and all(
        not isinstance(part, ast.FormattedValue) or (part.format_spec is None and part.conversion == -1)
        for part in node.values
    ):
        return Term("const", parts, "".join(str(part.value) for part in parts)[:100_000], frame.file, node.lineno)
    return Term("text", parts, None, frame.file, node.lineno)


def _spelt(m: "Machine", term: Term, file: str, line: int) -> Term:
    """What an object of the script's own class becomes in a text, by its own method."""
    found = calls.method(m, term, "__format__", [Term("const", (), "", file, line)], file, line)
    return found or calls.method(m, term, "__str__", [], file, line) or term


def _attribute(m: "Machine", node: Any, frame: Frame) -> Term:
    return attribute(m, value(m, node.value, frame), node.attr, frame.file, node.lineno)


def _call(m: "Machine", node: Any, frame: Frame) -> Term:
    return calls.call(m, node, frame)


def _lambda(m: "Machine", node: Any, frame: Frame) -> Term:
    return function(m, node, frame)


def _named(m: "Machine", node: Any, frame: Frame) -> Term:
    term = value(m, node.value, frame)
    assigning.assign(m, node.target, term, frame)
    return term


def _starred(m: "Machine", node: Any, frame: Frame) -> Term:
    return value(m, node.value, frame)


def _yield(m: "Machine", node: Any, frame: Frame) -> Term:
    term = value(m, node.value, frame)
    if isinstance(node, ast.YieldFrom):
        term = element(m, term, frame.file, node.lineno)
    frame.yields.append(term)
    return frame.sent or Term("free", (), "sent", frame.file, node.lineno)


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
