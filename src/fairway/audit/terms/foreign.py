"""What functions that are not the script's own do to values: wrappers, containers, in-place changes, settings."""

import ast
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fairway.audit.settings import PURE, UNKNOWN, attempt
from fairway.audit.terms import calls, expressions
from fairway.audit.terms.term import Term
from fairway.audit.terms.things import Class, Instance, constant

if TYPE_CHECKING:
    from fairway.audit.terms.calls import Here
    from fairway.audit.terms.machine import Machine

# Functions that give their first argument back, as far as values are concerned.
_WRAPPERS = frozenset(
    """compile DistributedDataParallel DDP DataParallel script lru_cache cache wraps deepcopy copy jit inference_mode
    no_grad disable allow_in_graph contextmanager njit vectorize""".split()  # noqa: SIM905
)
_CALLERS = {"Thread": "target", "Process": "target", "spawn": "fn", "run": "", "Fire": "", "cli": "", "launch": ""}
_FILLING = frozenset(
    """append extend add update insert setdefault appendleft push put clear remove discard pop sort subtract
    put_nowait""".split()  # noqa: SIM905
)
_ADDING = frozenset(("scatter_add_", "index_add_", "scatter_reduce_", "index_reduce_"))
_TEXT = frozenset(
    """lower upper strip lstrip rstrip split startswith endswith replace join format encode decode removeprefix
    removesuffix title capitalize casefold zfill partition rpartition isdigit isalpha count find get""".split()  # noqa: SIM905
)


def function(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term:
    """A call of a function known by its dotted name."""
    handler = _SPECIAL.get(name) or _SPECIAL_LAST.get(name.rsplit(".", 1)[-1])
    if handler is not None:
        found = handler(m, name, positional, named, here)
        if found is not None:
            return found
    folded = _folded(name, positional, named, here)
    if folded is not None:
        return folded
    last = name.rsplit(".", 1)[-1]
    if last in _WRAPPERS and positional and positional[0].op in ("function", "object", "bound", "class"):
        return positional[0]
    if last in _CALLERS:
        _call_target(m, _CALLERS[last], positional, named, here)
    if "key" in named and named["key"].op in ("function", "bound", "name") and positional:
        one = expressions.element(m, positional[0], here.file, here.line)
        named = {**named, "key": calls.dispatch(m, named["key"], [one], {}, _inner(here))}
    term = calls.opaque(m, name, positional, named, here)
    if last == "at" and len(positional) >= 2 and here.node is not None:  # np.add.at(table, where, what)
        changed = _added(positional[0], positional[1], positional[2] if len(positional) > 2 else term, here)
        m.write_back(here.node.args[0], changed, here.frame)
    if "out" in named and here.node is not None:
        target = next(keyword.value for keyword in here.node.keywords if keyword.arg == "out")
        m.write_back(target, term, here.frame)
    return term


def _inner(here: "Here") -> "Here":
    """The same place, for a call that the text does not write out."""
    return calls.Here(None, here.frame, None, False, here.line)


def _folded(name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """Conversions and formulas of constants."""
    if named or not positional or not all(term.op == "const" for term in positional):
        return None
    pure: Any = PURE.get(name)
    if pure is None and name.startswith("math.") and hasattr(math, name[5:]) and name != "math.factorial":
        pure = getattr(math, name[5:])
    if pure is None and name in ("numpy.log", "numpy.log2", "numpy.exp", "numpy.sqrt"):
        pure = getattr(math, name[6:])
    if pure is None and name.startswith("os.path."):
        pure = {"join": lambda *parts: "/".join(map(str, parts))}.get(name[8:])
    if pure is None and name in ("pathlib.Path", "Path") and len(positional) == 1:
        pure = str
    if pure is None and name in ("chr", "ord"):
        pure = {"chr": chr, "ord": ord}[name]
    if pure is None:
        return None
    result = attempt(pure, *[term.value for term in positional])
    return None if result is UNKNOWN else Term("const", tuple(positional), result, here.file, here.line)


def _call_target(m: "Machine", key: str, positional: list[Term], named: dict[str, Term], here: "Here") -> None:
    """Thread(target=f, args=(...)), spawn(f, args=(...)), run(f): f is called."""
    target = named.get(key) or (positional[0] if positional else None)
    if target is None or target.op not in ("function", "bound"):
        return
    given = named.get("args")
    arguments = list(given.parts) if given is not None and given.op in ("tuple", "list") else []
    if key == "fn":
        arguments = [Term("free", (), "rank", here.file, here.line), *arguments]
    calls.dispatch(m, target, arguments, {}, _inner(here))


def _added(table: Term, index: Term, amount: Term, here: "Here") -> Term:
    before = Term("item", (table, index), None, here.file, here.line)
    total = Term("op", (before, amount), "+", here.file, here.line)
    return Term("store", (table, index, total), None, here.file, here.line)


def method(m: "Machine", base: Term, word: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term:
    """A method of a value that is not the script's own class."""
    handler = _METHODS.get(word)
    if handler is not None:
        found = handler(m, base, positional, named, here)
        if found is not None:
            return found
    if base.op == "const" and word in _TEXT and not named and all(term.op == "const" for term in positional):
        folded = attempt(lambda: getattr(base.value, word)(*[term.value for term in positional]))
        if folded is not UNKNOWN and len(str(folded)) < 100_000:
            return Term("const", (base, *positional), folded, here.file, here.line)
    if base.op == "object" and calls.returns_itself(word):
        return base
    if (
        word in ("submit", "apply_async", "map", "imap", "starmap")
        and positional
        and positional[0].op in ("function", "bound")
    ):
        rest = positional[1:]
        if word != "submit" and rest:
            rest = [expressions.element(m, rest[0], here.file, here.line)]
        result = calls.dispatch(m, positional[0], rest, {}, _inner(here))
        return Term("list", (result,), "comp", here.file, here.line) if word in ("map", "imap", "starmap") else result
    if word == "result" and not positional and base.op != "call":  # of a future, whose value is known
        return base
    if "key" in named and named["key"].op in ("function", "bound") and word == "sort":
        one = expressions.element(m, base, here.file, here.line)
        named = {**named, "key": calls.dispatch(m, named["key"], [one], {}, _inner(here))}
    term = calls.opaque(m, "." + word, [base, *positional], named, here, receiver=True)
    node = here.node
    if node is None or not isinstance(node.func, ast.Attribute) or base.op in ("object", "name"):
        return term
    if word in _ADDING and len(positional) + len(named) >= 3:
        index, amount = term.argument(1, "index"), term.argument(2, "src", "source")
        if index is not None and amount is not None:
            changed = _added(base, index, amount, here)
            m.write_back(node.func.value, changed, here.frame)
            return changed
    in_place = word.endswith("_") and not word.endswith("__")
    if in_place or (here.statement and word in _FILLING):
        changed = Term("mutate", term.parts, "." + word, here.file, here.line, term.keys)
        m.write_back(node.func.value, changed, here.frame)
        return changed if in_place else term
    return term


# ---- functions with a meaning of their own: (machine, name, positional, named, here) -> term, or None to go on


def _environ_get(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if not positional:
        return None
    default = positional[1] if len(positional) > 1 else named.get("default", constant(None, here.file, here.line))
    return m.environ(positional[0], default, here.file, here.line)


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
    found = expressions.attribute(m, positional[0], str(positional[1].value), here.file, here.line)
    missing = found.op == "attr" and positional[0].op in ("object", "class") and len(positional) > 2
    return positional[2] if missing else found


def _setattr(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if len(positional) == 3 and positional[1].op == "const" and positional[0].op == "object":
        owner: Instance = positional[0].value
        word = str(positional[1].value)
        owner.attrs[word] = m.weakly(owner.depth, positional[2], owner.attrs.get(word))
    return None


def _hasattr(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if len(positional) == 2 and positional[0].op == "object" and positional[1].op == "const":
        word = str(positional[1].value)
        if word in positional[0].value.attrs or positional[0].value.kind.find(word) is not None:
            return constant(True, here.file, here.line)
    return None


def _empty(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if name == "dict" and not positional:
        parts = tuple(part for key, term in named.items() for part in (constant(key, here.file, here.line), term))
        return Term("dict", parts, None, here.file, here.line)
    if not positional and not named:
        return Term(name, (), None, here.file, here.line)
    if positional and positional[0].op == "object" and name in ("list", "tuple", "set"):
        one = expressions.element(m, positional[0], here.file, here.line)
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
    return expressions.element(m, positional[0], here.file, here.line) if positional else None


def _map(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if len(positional) < 2:
        return None
    parts = [expressions.element(m, term, here.file, here.line) for term in positional[1:]]
    if positional[0].op in ("function", "bound", "class", "name"):
        return Term("list", (calls.dispatch(m, positional[0], parts, {}, _inner(here)),), "comp", here.file, here.line)
    return None


def _reduce(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """Two rounds of functools.reduce, as of a loop."""
    if len(positional) < 2 or positional[0].op not in ("function", "bound"):
        return None
    element = expressions.element(m, positional[1], here.file, here.line)
    carried = positional[2] if len(positional) > 2 else element
    for _ in range(2):
        m.rounds += 1
        one = expressions.fresh(element, m.rounds)
        after = calls.dispatch(m, positional[0], [carried, one], {}, _inner(here))
        carried = _either(carried, after, here)
    return after


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
        return calls.dispatch(m, named["default_factory"], [], {}, _inner(here))
    return None


def _replace(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if not positional or positional[0].op != "object":
        return None
    old: Instance = positional[0].value
    return Term("object", (), Instance(old.kind, {**old.attrs, **named}, len(m.conditions)), here.file, here.line)


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


def _register(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    if base.op == "object" and positional and positional[0].op == "const":
        term = positional[1] if len(positional) > 1 else named.get("tensor")
        if term is not None:
            base.value.attrs[str(positional[0].value)] = term
    return None


def _get(m: "Machine", base: Term, positional: list[Term], named: dict[str, Term], here: "Here") -> Term | None:
    """table.get(key, default) of a table that is written out."""
    if base.op == "dict" and base.value != "comp" and positional and positional[0].op == "const":
        found = expressions.item(m, base, positional[0], here.file, here.line)
        if found.op != "item":
            return found
    return None


_SPECIAL: dict[str, Any] = {
    "os.environ.get": _environ_get,
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
    "typing.cast": lambda m, name, positional, named, here: positional[1] if len(positional) == 2 else None,
}
_SPECIAL_LAST: dict[str, Any] = {
    "partial": _partial,
    "reduce": _reduce,
    "SimpleNamespace": _namespace,
    "Namespace": _namespace,
    "namedtuple": _namedtuple,
    "field": _field,
    "replace": _replace,
}
_METHODS: dict[str, Any] = {
    "add_argument": _add_argument,
    "register_buffer": _register,
    "register_parameter": _register,
    "get": _get,
}
