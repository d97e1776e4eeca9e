"""Calls: the script's own functions are entered; what others' functions do to values is told in `foreign`."""

import ast
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fairway.audit.settings import Settings
from fairway.audit.terms import assigning, attributes, elements, expressions, foreign, items, objects
from fairway.audit.terms.term import Key, Term, alternatives, peel
from fairway.audit.terms.things import Bound, Class, Coroutine, Frame, Function, Instance, constant

if TYPE_CHECKING:
    from fairway.audit.terms.machine import Machine

_SELF_RETURNING = frozenset(
    ("to", "cuda", "cpu", "float", "half", "bfloat16", "double", "eval", "train", "requires_grad_", "apply", "module")
)


def call(m: "Machine", node: ast.Call, frame: Frame) -> Term:
    """The term of a call, after it was entered or recorded."""
    if isinstance(node.func, ast.Name) and node.func.id == "super":
        return _super(frame, node)
    if isinstance(node.func, ast.Name) and node.func.id == "zip" and len(node.args) == 1:
        rows = node.args[0]
        if isinstance(rows, ast.Starred):
            columns = items.transposed(m, expressions.value(m, rows.value, frame), frame.file, node.lineno)
            if columns is not None:
                return columns
    base: Term | None = None
    statement = m.statement is node
    if isinstance(node.func, ast.Attribute):
        base = expressions.value(m, node.func.value, frame)
        function = attributes.attribute(m, base, node.func.attr, frame.file, node.lineno)
    else:
        function = expressions.value(m, node.func, frame)
    positional = _positional(m, node, frame, _room(function, node))
    named = _named(m, node, frame)
    here = Here(node, frame, base, statement)
    if m.layers:
        m.execute(frame.file, node.lineno, frame)
    return dispatch(m, function, positional, named, here)


class Here:
    """Where a call stands: its text, the frame, what a method is called on, whether its value is thrown away."""

    def __init__(self, node: ast.Call | None, frame: Frame, base: Term | None, statement: bool, line: int = 0) -> None:
        self.node, self.frame, self.base, self.statement = node, frame, base, statement
        self.file, self.line = frame.file, node.lineno if node is not None else line


def _super(frame: Frame, node: ast.Call) -> Term:
    at: Frame | None = frame
    while at is not None and "__owner__" not in at.vars:
        at = at.outer
    if at is None:
        return Term("free", (), "super", frame.file, node.lineno)
    return Term("super", (), (at.vars["__owner__"].value, at.vars["__self__"]), frame.file, node.lineno)


_MOST = 3  # items of a sequence that is handed over, where nobody knows how many it has
_WIDEST = 8  # of those, where a function of the script says how many it takes


def _room(function: Term, node: ast.Call) -> int:
    """How many parameters of a function are left for a sequence of unknown length: `add(x, *spans[b], sums)`."""
    called = function.value.function if function.op == "bound" else function.value
    stars = sum(isinstance(each, ast.Starred) for each in node.args)
    if function.op not in ("function", "bound") or stars != 1 or called.node.args.vararg is not None:
        return _MOST
    taken = called.node.args
    named = {each.arg for each in node.keywords}
    asked = [each.arg for each in (*taken.posonlyargs, *taken.args)][: -len(taken.defaults) or None]
    left = len([each for each in asked if each not in named]) - (function.op == "bound") - (len(node.args) - 1)
    return left if 0 < left <= _WIDEST else _MOST


def _positional(m: "Machine", node: ast.Call, frame: Frame, room: int) -> list[Term]:
    """room: items of a sequence of which nobody knows how many it has."""
    terms: list[Term] = []
    for argument in node.args:
        term = expressions.value(m, argument, frame)
        if not isinstance(argument, ast.Starred):
            terms.append(term)
        elif term.op in ("list", "tuple") and term.value != "comp":
            terms.extend(term.parts)
        else:
            terms.extend(
                items.item(m, term, constant(i, frame.file, node.lineno), frame.file, node.lineno) for i in range(room)
            )
    return terms


def _named(m: "Machine", node: ast.Call, frame: Frame) -> dict[str, Term]:
    terms: dict[str, Term] = {}
    for keyword in node.keywords:
        term = expressions.value(m, keyword.value, frame)
        if keyword.arg is not None:
            terms[keyword.arg] = term
        else:
            terms.update((str(key), value) for key, value in (elements.entries(term) or {}).items())
    return terms


_TRANSFORMED = frozenset(("grad_and_value", "value_and_grad"))
_OWN = frozenset(("function", "bound", "object"))


def dispatch(m: "Machine", function: Term, positional: list[Term], named: dict[str, Term], here: Here) -> Term:
    """Calls whatever `function` stands for."""
    if function.op == "function":
        return _entered(m, function.value, positional, named, here, 0)
    if function.op == "bound":
        bound: Bound = function.value
        return _entered(m, bound.function, [bound.owner, *positional], named, here, 1)
    if function.op == "class":
        return instantiate(m, function.value, positional, named, here.file, here.line)
    if function.op == "object":
        for word in ("__call__", "forward"):
            found = function.value.kind.find(word)
            if found is not None and found.op == "function":
                return _entered(m, found.value, [function, *positional], named, here, 1)
        return opaque(m, "()", [function, *positional], named, here)
    if function.op in ("choice", "merge") and len(function.parts) <= 6:
        options = function.parts[1:] if function.op == "choice" else function.parts
        if any(option.op in ("function", "bound", "class", "object", "name") for option in options):
            kept = tuple(o for o in options if not (o.op == "const" and o.value is None)) or options
            results = tuple(
                _under(m, function, option, positional, named, here)
                if len(kept) == len(options) == 2
                else dispatch(m, option, positional, named, here)
                for option in kept
            )
            if len(results) == 1:
                return results[0]
            if function.op == "choice" and len(results) == 2:
                return Term("choice", (function.parts[0], *results), None, here.file, here.line)
            return Term("merge", results, None, here.file, here.line)
    if function.op == "call" and id(function) in m.commands:
        for command in m.commands[id(function)][1]:
            dispatch(m, command, [], {}, here)
    if function.op == "call" and function.called in _TRANSFORMED and function.parts and function.parts[0].op in _OWN:
        inner = dispatch(m, function.parts[0], positional, named, here)
        gradient = Term(
            "call", (function, *positional), "grad", here.file, here.line, ("self", *range(len(positional)))
        )
        return Term("tuple", (gradient, inner) if function.called == "grad_and_value" else (inner, gradient))
    if function.op == "call" and function.called == "grad" and function.parts and function.receiver is None:
        keys: tuple[Key, ...] = ("self", *range(len(positional)), *named)
        return Term("call", (function, *positional, *named.values()), "grad", here.file, here.line, keys)
    if function.op == "call" and function.called == "vmap" and function.parts and function.receiver is None:
        return dispatch(m, function.parts[0], positional, named, here)
    if function.op == "name":
        return foreign.function(m, function.value, positional, named, here)
    if function.op == "item" and function.parts[0].op == "function":  # kernel[grid](...)
        return foreign.launched(m, function.parts[0].value, positional, named, here)
    applied = _applied(m, positional, named, here)
    if applied is not None:
        return applied
    if here.base is not None and here.node is not None and isinstance(here.node.func, ast.Attribute):
        return foreign.method(m, here.base, here.node.func.attr, positional, named, here)
    return opaque(m, "()", [function, *positional], named, here)


def _applied(m: "Machine", positional: list[Term], named: dict[str, Term], here: Here) -> Term | None:
    """Function.apply(...) of an autograd function of the script's own: what its `forward` makes, which is given a
    context first unless `setup_context` takes that."""
    if here.base is None or here.base.op != "class" or getattr(getattr(here.node, "func", None), "attr", "") != "apply":
        return None
    forward = here.base.value.find("forward")
    if forward is None or forward.op != "function":
        return None
    alone = here.base.value.find("setup_context") is not None
    given = [] if alone else [Term("free", (), "ctx", here.file, here.line)]
    return _entered(m, forward.value, [*given, *positional], named, here, len(given))


def _under(
    m: "Machine", function: Term, option: Term, positional: list[Term], named: dict[str, Term], here: Here
) -> Term:
    """One of two functions that a condition decides between: what it does is done under that condition."""
    if function.op != "choice":
        return dispatch(m, option, positional, named, here)
    test = function.parts[0]
    held = test if option is function.parts[1] else Term("op", (test,), "not", test.file, test.line)
    m.conditions.append(held)
    try:
        return dispatch(m, option, positional, named, here)
    finally:
        m.conditions.pop()


def opaque(
    m: "Machine", name: str, positional: list[Term], named: Mapping[str, Term], here: Here, receiver: bool = False
) -> Term:
    """A call that is not entered: its term holds all that went into it."""
    keys: list[Key] = list(range(len(positional)))
    if receiver:
        keys = ["self", *range(len(positional) - 1)]
    term = Term("call", (*positional, *named.values()), name, here.file, here.line, (*keys, *named))
    m.record(term)
    return term


def method(m: "Machine", base: Term, word: str, positional: list[Term], file: str, line: int) -> Term | None:
    """Calls a method that the script's own class defines; None where it has none."""
    if base.op != "object":
        return None
    found = base.value.kind.find(word)
    if found is None or found.op != "function":
        return None
    return enter(m, found.value, [base, *positional], {}, Term("call", (base, *positional), "." + word, file, line))


def _entered(
    m: "Machine", function: Function, positional: list[Term], named: dict[str, Term], here: Here, owners: int
) -> Term:
    before, more = function.given
    positional = [*before, *positional] if not owners else positional
    named = {**dict(more), **named}
    keys: tuple[Key, ...] = (*range(len(positional)), *named)
    closed = Term("call", (*positional, *named.values()), function.name, here.file, here.line, keys)
    changed: dict[str, Term] = {}
    result = enter(m, function, positional, named, closed, changed)
    if here.node is not None and changed:
        _copy_out(m, function, here, changed, owners + len(before), len(positional))
    return result


def _copy_out(m: "Machine", function: Function, here: Here, changed: dict[str, Term], skip: int, count: int) -> None:
    """A container that a function filled in place is filled for its caller, too. skip: parameters that the call does
    not write; count: positional arguments with them."""
    assert here.node is not None
    names = [a.arg for a in (*function.node.args.posonlyargs, *function.node.args.args)]
    given = here.node.args
    stars = [n for n, argument in enumerate(given) if isinstance(argument, ast.Starred)]
    before = given[: stars[0]] if stars else given
    after = given[stars[-1] + 1 :] if stars else []
    arguments: list[tuple[str, ast.expr]] = list(zip(names[skip:], before, strict=False))
    arguments += zip(names[count - len(after) :] if after else (), after, strict=False)
    arguments += [(keyword.arg, keyword.value) for keyword in here.node.keywords if keyword.arg]
    for name, argument in arguments:
        if name in changed and isinstance(argument, (ast.Name, ast.Attribute, ast.Subscript)):
            assigning.write_back(m, argument, changed[name], here.frame)


def enter(
    m: "Machine",
    function: Function,
    positional: list[Term],
    named: dict[str, Term],
    closed: Term,
    changed: dict[str, Term] | None = None,
    sent: Term | None = None,
) -> Term:
    """The value of a function's body for these arguments; `closed`, the call itself, where it is not entered.
    changed: receives the parameters whose container was filled in place; sent: what a coroutine's `yield` answers."""
    if not m.may_enter(function):
        m.record(closed)
        return closed
    node = function.node
    frame = Frame(function.frame.file, outer=function.frame, depth=len(m.conditions), sent=sent)
    given = _parameters(m, function, positional, named, frame)
    frame.vars.update(given)
    if function.owner is not None and positional:
        frame.vars["__owner__"] = Term("class", (), function.owner)
        frame.vars["__self__"] = positional[0]
    m.active.append(node)
    m.path.append(function.name)
    m.marks.append(m.loops)
    loops, m.loops = m.loops, m.loops
    try:
        if isinstance(node, ast.Lambda):
            return expressions.value(m, node.body, frame)
        ended = m.block(node.body, frame)
    finally:
        m.active.pop()
        m.path.pop()
        m.marks.pop()
        m.loops = loops
    if changed is not None:
        for name, before in given.items():
            after = frame.vars.get(name, before)
            if after is not before and _grew_from(m, after, before):
                changed[name] = after
    if frame.yields:
        merged = (
            frame.yields[0]
            if len(frame.yields) == 1
            else Term("merge", tuple(frame.yields), None, frame.file, node.lineno)
        )
        yielded = Term("list", (merged,), "comp", frame.file, node.lineno)
        m.coroutines[id(yielded)] = (yielded, Coroutine(function, tuple(positional), tuple(named.items())))
        return yielded
    return _returned(frame, ended, node.lineno)


def send(m: "Machine", routine: Term, sent: Term, file: str, line: int) -> Term | None:
    """What a coroutine answers to what it is sent: its body is read once more with that in place of `yield`."""
    answers: list[Term] = []
    for one in alternatives(routine, 6):
        _, known = m.coroutines.get(id(one), (None, None))
        if known is not None:
            closed = Term("call", (one, sent), ".send", file, line, ("self", 0))
            yielded = enter(m, known.function, list(known.positional), dict(known.named), closed, sent=sent)
            answers.append(closed if yielded is closed else elements.element(m, yielded, file, line))
    if not answers:
        return None
    return answers[0] if len(answers) == 1 else Term("merge", tuple(answers), None, file, line)


def _parameters(
    m: "Machine", function: Function, positional: list[Term], named: dict[str, Term], frame: Frame
) -> dict[str, Term]:
    arguments = function.node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    given = dict(function.defaults)
    given.update(zip(names, positional, strict=False))
    known = {*names, *(a.arg for a in arguments.kwonlyargs)}
    given.update({name: term for name, term in named.items() if name in known})
    line = function.node.lineno
    if arguments.vararg is not None:
        given[arguments.vararg.arg] = Term("tuple", tuple(positional[len(names) :]), None, frame.file, line)
    if arguments.kwarg is not None:
        rest = [(n, t) for n, t in named.items() if n not in known]
        parts = tuple(part for n, t in rest for part in (constant(n, frame.file, line), t))
        given[arguments.kwarg.arg] = Term("dict", parts, None, frame.file, line)
    for name in known - set(given):
        given[name] = Term("free", (), name, frame.file, line)
    for name, default in function.defaults.items():
        term = given[name]
        if term is default and term.op == "call" and str(term.value).startswith("typer."):
            given[name] = term.argument(0, "default") or term
    return given


def _grew_from(m: "Machine", after: Term, before: Term) -> bool:
    """Whether a value is the given one with stores and in-place changes on top: `total += x` of a tensor is one."""
    waiting, steps = [after], 0
    while waiting and steps < 200:
        term = waiting.pop()
        steps += 1
        if term is before:
            return True
        if term.op in ("store", "mutate") or id(term) in m.augmented:
            waiting.append(term.parts[0])
        elif term.op in ("choice", "merge"):
            waiting.extend(term.parts[1:] if term.op == "choice" else term.parts)
    return False


def is_array(term: Term) -> bool:
    """Whether a value was made as an array or a tensor: what is added to it in place, its other names see too."""
    waiting, steps = [term], 0
    while waiting and steps < 60:
        one = peel(waiting.pop())
        steps += 1
        if one.op == "call" and one.called in _ARRAYS:
            return True
        if one.op in ("choice", "merge"):
            waiting.extend(one.parts[1:] if one.op == "choice" else one.parts)
        elif one.op in ("store", "mutate", "op", "item") and one.parts:
            waiting.append(one.parts[0])
    return False


_ARRAYS = frozenset(
    """zeros ones empty full zeros_like ones_like empty_like full_like new_zeros new_ones new_full tensor array
    as_tensor asarray scalar_tensor""".split()  # noqa: SIM905
)


def _returned(frame: Frame, ended: bool, line: int) -> Term:
    """One value of all returns: a choice where a condition decides between them."""
    returns = list(frame.returns)
    if not returns:
        return constant(None, frame.file, line)
    result = returns.pop()[1] if ended or returns[-1][0] is None else constant(None, frame.file, line)
    for test, term in reversed(returns):
        result = (
            term if test is None or term is result else Term("choice", (test, term, result), None, term.file, term.line)
        )
    return result


def instantiate(
    m: "Machine", kind: Class, positional: list[Term], named: dict[str, Term], file: str, line: int
) -> Term:
    instance = Instance(kind, depth=len(m.conditions), order=len(m.events))
    term = Term("object", (), instance, file, line)
    start = kind.find("__init__")
    outside = objects.container(kind)
    if outside:
        given = (positional, named) if start is None else ([], {})
        objects.hold(m, term, foreign.filled(m, outside, *given, file, line))
    if start is not None and start.op == "function":
        enter(m, start.value, [term, *positional], named, Term("call", (term, *positional), kind.name, file, line))
        return term
    fields = kind.all_fields()
    instance.attrs.update(zip(fields, positional, strict=False))
    instance.attrs.update({name: value for name, value in named.items() if name in fields})
    method(m, term, "__post_init__", [], file, line)
    return term


def with_environment(settings: Settings, name: str, value: Any) -> Settings:
    """The settings after the script itself has set a variable."""
    return replace(settings, environment={**settings.environment, name: str(value)})


def returns_itself(word: str) -> bool:
    """Methods that a module of the framework has and that give the module back."""
    return word in _SELF_RETURNING
