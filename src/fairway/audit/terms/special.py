"""Functions and methods that are not the script's own and have a meaning of their own: settings, containers, callers.

Each is (machine, name, positional, named, here) -> term, or None to go on; a method has its base in the name's place.
"""

import ast
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fairway.audit.settings import PURE, UNKNOWN, attempt
from fairway.audit.terms import assigning, attributes, beside, calls, elements, items, objects
from fairway.audit.terms.term import Term, layers
from fairway.audit.terms.things import Class, Instance, constant

if TYPE_CHECKING:
    from fairway.audit.terms.calls import Here
    from fairway.audit.terms.machine import Machine


def inner(here: "Here") -> "Here":
    """The same place, for a call that the text does not write out."""
    return calls.Here(None, here.frame, None, False, here.line)


def _environ_get(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if not positional:
        return None
    default = positional[1] if len(positional) > 1 else named.get("default", constant(None, here.file, here.line))
    return m.environ(positional[0], default, here.file, here.line)


def _environ_items(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term:
    """os.environ.items(): what the run command says of its switches, and nothing else."""
    said = [(name, text) for name, text in m.settings.environment.items() if isinstance(text, str)]
    pairs = [tuple(constant(each, here.file, here.line) for each in pair) for pair in said]
    rows = tuple(Term("tuple", pair, None, here.file, here.line) for pair in pairs)
    return Term("list", rows, None if rows else "none", here.file, here.line)


def _environ_setdefault(
    m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here"
) -> Term | None:
    known = len(positional) == 2 and positional[0].op == "const" and positional[1].op == "const"
    if known and positional[0].value not in m.settings.environment:
        m.settings = calls.with_environment(m.settings, str(positional[0].value), positional[1].value)
    return None


def _partial(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if positional and positional[0].op == "function":
        made = replace(positional[0].value, given=(tuple(positional[1:]), tuple(named.items())))
        return Term("function", (), made, here.file, here.line)
    if positional and positional[0].op == "bound":
        bound = positional[0].value
        made = replace(bound.function, given=((bound.owner, *positional[1:]), tuple(named.items())))
        return Term("function", (), made, here.file, here.line)
    return None


def _getattr(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if len(positional) < 2 or positional[1].op != "const":
        return None
    found = attributes.attribute(m, positional[0], str(positional[1].value), here.file, here.line)
    missing = found.op == "attr" and positional[0].op in ("object", "class") and len(positional) > 2
    return positional[2] if missing else found


def _setattr(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if len(positional) == 3 and positional[1].op == "const" and positional[0].op == "object":
        owner: Instance = positional[0].value
        word = str(positional[1].value)
        owner.attrs[word] = assigning.weakly(m, owner.depth, positional[2], owner.attrs.get(word))
    elif len(positional) == 3 and positional[1].op == "const" and positional[0].op == "class":
        names = positional[0].value.vars
        names[str(positional[1].value)] = assigning.weakly(m, 0, positional[2], names.get(str(positional[1].value)))
    return None


def _hasattr(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if len(positional) == 2 and positional[0].op == "object" and positional[1].op == "const":
        word = str(positional[1].value)
        if word in positional[0].value.attrs or positional[0].value.kind.find(word) is not None:
            return constant(True, here.file, here.line)
    return None


def _environment(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term:
    return Term("name", (), "os.environ", here.file, here.line)


def _empty(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if name == "dict" and not positional:
        parts = tuple(part for key, term in named.items() for part in (constant(key, here.file, here.line), term))
        return Term("dict", parts, None, here.file, here.line)
    if name == "dict" and len(positional) == 1 and positional[0].value == "os.environ" and not named:
        return positional[0]
    positional = [objects.held(term) or term for term in positional]
    if not positional and not named:
        return Term(name, (), None, here.file, here.line)
    if positional and positional[0].op == "object" and name in ("list", "tuple", "set"):
        one = elements.element(m, positional[0], here.file, here.line)
        return Term("list", (one,), "comp", here.file, here.line) if one.op != "each" else None
    if (
        positional
        and positional[0].op in ("list", "tuple", "dict", "set")
        and name in ("list", "tuple", positional[0].op)
    ):
        one = positional[0]
        return (
            Term(name if one.op != "dict" else "dict", one.parts, one.value, here.file, here.line)
            if not named
            else None
        )
    return None


def _next(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    return elements.element(m, positional[0], here.file, here.line) if positional else None


def _map(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if len(positional) < 2:
        return None
    callable_ = positional[0].op in ("function", "bound", "class", "name")
    listed = elements.listing(positional[1]) if len(positional) == 2 else None
    if callable_ and listed is not None and 1 < len(listed) <= _FEW:  # map(sum, columns): one by one
        return Term(
            "list",
            tuple(calls.dispatch(m, positional[0], [one], {}, inner(here)) for one in listed),
            None,
            here.file,
            here.line,
        )
    parts = [elements.element(m, term, here.file, here.line) for term in positional[1:]]
    if callable_:
        return Term("list", (calls.dispatch(m, positional[0], parts, {}, inner(here)),), "comp", here.file, here.line)
    return None


_FEW = 12


def _reduce(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """Two rounds of functools.reduce, as of a loop; with an addition it is a sum."""
    if len(positional) < 2 or positional[0].op not in ("function", "bound"):
        adds = len(positional) == 2 and positional[0].op == "name" and positional[0].value in _ADDITIONS
        return Term("call", (positional[1],), "sum", here.file, here.line, (0,)) if adds else None
    element = elements.element(m, positional[1], here.file, here.line)
    carried = positional[2] if len(positional) > 2 else element
    for _ in range(2):
        m.rounds += 1
        one = elements.fresh(element, m.rounds)
        after = calls.dispatch(m, positional[0], [carried, one], {}, inner(here))
        carried = _either(carried, after, here)
    return after


_ADDITIONS = frozenset(("torch.add", "numpy.add", "operator.add", "operator.iadd", "add", "iadd"))


def _either(a: Term, b: Term, here: "Here") -> Term:
    """One or the other; tuples part by part."""
    if a.op == b.op == "tuple" and len(a.parts) == len(b.parts):
        return Term("tuple", tuple(_either(x, y, here) for x, y in zip(a.parts, b.parts, strict=True)), None, here.file)
    return a if a is b else Term("merge", (a, b), None, here.file, here.line)


def _namespace(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    return Term(
        "object", (), Instance(Class("SimpleNamespace", {}), dict(named), len(m.conditions)), here.file, here.line
    )


def _namedtuple(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if len(positional) < 2:
        return None
    listed = positional[1]
    words = listed.value if listed.op == "const" else [part.value for part in listed.parts if part.op == "const"]
    words = words.replace(",", " ").split() if isinstance(words, str) else list(words or ())
    return Term("class", (), Class(str(positional[0].value), {}, fields=tuple(map(str, words))), here.file, here.line)


def _field(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if "default" in named:
        return named["default"]
    if "default_factory" in named:
        return calls.dispatch(m, named["default_factory"], [], {}, inner(here))
    return None


def _functional(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """functional_call(module, parameters, arguments): the module's call."""
    given = [*positional, *(named[word] for word in ("args", "kwargs") if word in named)]
    if len(given) < 3 or given[0].op not in ("object", "choice", "merge", "function", "bound"):
        return None
    arguments = list(given[2].parts) if given[2].op in ("tuple", "list") and given[2].value != "comp" else [given[2]]
    return calls.dispatch(m, given[0], arguments, _texts(given[3]) if len(given) > 3 else {}, inner(here))


def _type(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """type(1024): int, which makes a number of a text."""
    if len(positional) != 1 or positional[0].op != "const" or type(positional[0].value).__name__ not in PURE:
        return None
    return Term("name", (), type(positional[0].value).__name__, here.file, here.line)


def _checkpoint(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """checkpoint(function, arguments...): its call."""
    if len(positional) < 2 or positional[0].op not in ("object", "function", "bound"):
        return None
    return calls.dispatch(m, positional[0], positional[1:], {}, inner(here))


def _texts(table: Term) -> dict[str, Term]:
    """A table with texts for keys, as keyword arguments."""
    pairs = zip(table.parts[::2], table.parts[1::2], strict=False) if table.op == "dict" else ()
    return {str(key.value): term for key, term in pairs if key.op == "const"}


def _replace(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    return objects.changed(m, positional[0], named, here.file, here.line) if len(positional) == 1 else None


def _replaced(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    return objects.changed(m, base, named, here.file, here.line)


def _vars(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if positional and attributes.is_parsed(positional[0]):
        return attributes.parsed_table(m, here.file, here.line)
    return objects.table(positional[0], here.file, here.line) if positional else None


def _sum(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """sum of the script's own objects: they are added by their own method, two rounds as of a loop."""
    one = elements.element(m, positional[0], here.file, here.line) if positional else None
    if one is None or not objects.owned(one):
        return None
    total = positional[1] if len(positional) > 1 else named.get("start", constant(0, here.file, here.line))
    for _ in range(2):
        added = objects.operated(m, ast.Add(), total, one, here.file, here.line)
        if added is None:
            return None
        total = added
    return total


def _gathered(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """all_gather(list, tensor): the list holds what every rank had."""
    if len(positional) < 2 or here.node is None or not here.node.args:
        return None
    target, given = (1, 0) if name.endswith("gather_object") and not name.endswith("all_gather_object") else (0, 1)
    if len(here.node.args) <= target:
        return None
    filled = Term("list", (positional[given],), "comp", here.file, here.line)
    assigning.write_back(m, here.node.args[target], filled, here.frame)
    return None


def _same(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    return positional[0] if positional else None


# ---- methods with a meaning of their own


def _add_argument(
    m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here"
) -> Term | None:
    """argparse: the option's name, its default, and what the command line says."""
    flags = [str(term.value) for term in positional if term.op == "const"]
    if not flags:
        return None
    long = next((flag for flag in flags if flag.startswith("--")), flags[0])
    word = str(named["dest"].value) if "dest" in named else long.lstrip("-").replace("-", "_")
    default = named.get("default", constant(None, here.file, here.line))
    action = named["action"].value if "action" in named else None
    if action in ("store_true", "store_false") and "default" not in named:
        default = constant(action == "store_false", here.file, here.line)
    kind = named["type"].value if "type" in named and named["type"].op == "name" else None
    said = m.settings.argument(long, UNKNOWN, PURE.get(str(kind)))
    if said is UNKNOWN:
        told = long.lstrip("-").replace("-", "_") in m.settings.arguments
        m.options[word] = Term("env", (default,), long, here.file, here.line) if told else _typed(default, kind, here)
    else:
        said = action == "store_true" if said is True and action else said
        m.options[word] = Term("const", (default,), said, here.file, here.line)
    return None


def _typed(default: Term, kind: Any, here: "Here") -> Term:
    if default.op == "const" and isinstance(default.value, str) and str(kind) in PURE:
        return Term("const", (default,), attempt(PURE[str(kind)], default.value), here.file, here.line)
    return default


def _handler(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """logger.addHandler(handler) of a handler of the script's own."""
    m.handlers.extend(one for one in positional if one.op == "object")
    return None


def _logging(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    listed = named.get("handlers")
    m.handlers.extend(one for one in (listed.parts if listed is not None else ()) if one.op == "object")
    return None


def _register(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if base.op == "object" and positional and positional[0].op == "const":
        term = positional[1] if len(positional) > 1 else named.get("tensor")
        if term is not None:
            base.value.attrs[str(positional[0].value)] = term
    return None


def _get(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """table.get(key, default) of a table that is written out; queue.get() of what was put."""
    if base.op == "dict" and base.value != "comp" and positional and positional[0].op == "const":
        found = items.item(m, base, positional[0], here.file, here.line)
        if found.op != "item":
            return found
    if not positional:
        put = [one for one in layers(base) if one.op == "mutate" and one.value in (".put", ".put_nowait")]
        if put:
            held = tuple(one.parts[1] for one in put if len(one.parts) > 1)
            return held[0] if len(held) == 1 else Term("merge", held, None, here.file, here.line)
    return None


def _setdefault(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """table.setdefault(name, value) of a table with named entries: what it holds afterwards."""
    if len(positional) != 2 or positional[0].op != "const" or here.node is None or base.op not in ("dict", "store"):
        return None
    if base.value == "comp" or not isinstance(here.node.func, ast.Attribute):
        return None
    found = items.item(m, base, positional[0], here.file, here.line)
    if found.op != "item":
        return found
    filled = Term("store", (base, *positional), None, here.file, here.line)
    assigning.write_back(m, here.node.func.value, filled, here.frame)
    return positional[1]


def _pop(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """table.pop(name) of a table with named entries: the others stay what they are."""
    table = elements.entries(base) or {}
    key = positional[0].constant() if positional else None
    if not isinstance(key, (str, int)) or key not in table:
        return None
    if here.node is None or not isinstance(here.node.func, ast.Attribute):
        return None
    taken = table.pop(key)
    pairs = [part for word, term in table.items() for part in (constant(word, here.file, here.line), term)]
    assigning.write_back(m, here.node.func.value, Term("dict", tuple(pairs), None, here.file, here.line), here.frame)
    return taken


def _len(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """How many functions are in a list of functions that is written out."""
    listed = elements.listing(positional[0]) if len(positional) == 1 else None
    if not listed or not all(part.op == "function" for part in listed):
        return None
    return constant(len(listed), here.file, here.line)


def _index(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """Where something stands in a list that is written out."""
    listed = elements.listing(base)
    if listed is None or len(positional) != 1:
        return None
    wanted = positional[0]
    for at, one in enumerate(listed):
        if one is wanted or (one.op == wanted.op == "const" and one.value == wanted.value):
            return constant(at, here.file, here.line)
        if one.op == wanted.op == "function" and one.value is wanted.value:
            return constant(at, here.file, here.line)
    return None


def _send(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    return calls.send(m, base, positional[0], here.file, here.line) if positional else None


def _between(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """torch.lerp(one, other, weight): (1 - weight) * one + weight * other."""
    given = [*positional, *(named[key] for key in ("end", "weight") if key in named)]
    if len(given) != 3:
        return None
    one, other, weight = given
    rest = Term("op", (constant(1.0, here.file, here.line), weight), "-", here.file, here.line)
    sides = (Term("op", each, "*", here.file, here.line) for each in ((rest, one), (weight, other)))
    return Term("op", tuple(sides), "+", here.file, here.line)


def _lerp(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    return _between(m, "", [base, *positional], named, here)


FUNCTIONS: dict[str, Any] = {
    "os.environ.get": _environ_get,
    "os.environ.items": _environ_items,
    "os.environ.copy": _environment,
    "os.getenv": _environ_get,
    "os.environ.setdefault": _environ_setdefault,
    "getattr": _getattr,
    "setattr": _setattr,
    "hasattr": _hasattr,
    "list": _empty,
    "dict": _empty,
    "set": _empty,
    "tuple": _empty,
    "next": _next,
    "iter": _same,
    "map": _map,
    "sum": _sum,
    "len": _len,
    "vars": _vars,
    "json.load": beside.loaded,
    "json.loads": beside.loaded,
    "logging.basicConfig": _logging,
    "type": _type,
    "asyncio.run": _same,
    "torch.lerp": _between,
    "typing.cast": lambda m, name, positional, named, here: positional[1] if len(positional) == 2 else None,
}
LAST_WORDS: dict[str, Any] = {
    "partial": _partial,
    "reduce": _reduce,
    "SimpleNamespace": _namespace,
    "Namespace": _namespace,
    "namedtuple": _namedtuple,
    "field": _field,
    "replace": _replace,
    "functional_call": _functional,
    "checkpoint": _checkpoint,
    "all_gather": _gathered,
    "all_gather_object": _gathered,
    "gather_object": _gathered,
}
METHODS: dict[str, Any] = {
    "add_argument": _add_argument,
    "addHandler": _handler,
    "register_buffer": _register,
    "register_parameter": _register,
    "get": _get,
    "send": _send,
    "index": _index,
    "_asdict": lambda m, base, positional, named, here: objects.table(base, here.file, here.line),
    "_replace": _replaced,
    "setdefault": _setdefault,
    "pop": _pop,
    "run_until_complete": lambda m, base, positional, named, here: positional[0] if positional else None,
    "asend": _send,
    "lerp": _lerp,
}
