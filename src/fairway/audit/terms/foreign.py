"""What functions that are not the script's own do to values: wrappers, containers, in-place changes, settings."""

import ast
import math
from typing import TYPE_CHECKING, Any

from fairway.audit.reading.kernels import operators, prices
from fairway.audit.settings import PURE, UNKNOWN, attempt
from fairway.audit.terms import assigning, calls, elements, items, objects, special
from fairway.audit.terms.term import Term
from fairway.audit.terms.things import Frame, Function, constant

if TYPE_CHECKING:
    from fairway.audit.terms.calls import Here
    from fairway.audit.terms.machine import Machine

_ENTROPY = "torch.nn.functional.cross_entropy"
# Functions that give their first argument back, as far as values are concerned.
_WRAPPERS = frozenset(
    """compile DistributedDataParallel DDP DataParallel script lru_cache cache wraps deepcopy copy jit inference_mode
    no_grad disable allow_in_graph contextmanager njit vectorize vmap""".split()  # noqa: SIM905
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
    own = here.frame.module.vars.get(operators(m.entry.tree).get(name.removesuffix(".default"), ""))
    if own is not None:  # torch.ops.space.name, which the script adds itself
        return calls.dispatch(m, own, positional, named, here)
    handler = special.FUNCTIONS.get(name) or special.LAST_WORDS.get(name.rsplit(".", 1)[-1])
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
        one = elements.element(m, positional[0], here.file, here.line)
        named = {**named, "key": calls.dispatch(m, named["key"], [one], {}, special.inner(here))}
    term = calls.opaque(m, name, positional, named, here)
    if last == "at" and len(positional) >= 2 and here.node is not None:  # np.add.at(table, where, what)
        changed = _added(positional[0], positional[1], positional[2] if len(positional) > 2 else term, here)
        assigning.write_back(m, here.node.args[0], changed, here.frame)
    if "out" in named and here.node is not None:
        target = next(keyword.value for keyword in here.node.keywords if keyword.arg == "out")
        assigning.write_back(m, target, term, here.frame)
    return term


def launched(m: "Machine", kernel: Function, positional: list[Term], named: dict[str, Term], here: "Here") -> Term:
    """A kernel that writes losses into a tensor that it is given: what torch makes of the others by cross_entropy."""
    priced = prices(kernel.node)
    given = priced.given(positional, list(named.items())) if priced is not None else {}
    if priced is None or not given or here.node is None:
        return calls.opaque(m, "()", positional, named, here)
    held = priced.given(here.node.args, [(each.arg, each.value) for each in here.node.keywords])
    each = {"reduction": constant("none", here.file, here.line)}
    losses = calls.opaque(m, _ENTROPY, [given[priced.logits], given[priced.targets]], each, here)
    for name in priced.losses:
        if name in held:
            assigning.write_back(m, held[name], losses, here.frame)
    return losses


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
    calls.dispatch(m, target, arguments, {}, special.inner(here))


def _beneath(node: ast.expr) -> ast.expr:
    """The name that a view is made of: tokens of tokens.numpy(), memoryview(tokens), tokens[:n]."""
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS:
            node = node.func.value
        elif isinstance(node, ast.Call) and node.args and _word(node.func) in _VIEWS:
            node = node.args[0]
        elif isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in ("data", "array")):
            node = node.value
        else:
            return node


_VIEWS = frozenset(
    ("numpy", "memoryview", "cast", "view", "asarray", "untyped_storage", "detach", "cpu", "from_buffer")
)


def _word(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _added(table: Term, index: Term, amount: Term, here: "Here") -> Term:
    before = Term("item", (table, index), None, here.file, here.line)
    total = Term("op", (before, amount), "+", here.file, here.line)
    return Term("store", (table, index, total), None, here.file, here.line)


def filled(m: "Machine", name: str, positional: list[Term], named: dict[str, Term], file: str, line: int) -> Term:
    """What lies in a container that was made like this: a term of its own, known by no other name."""
    here = calls.Here(None, Frame(file), None, False, line)
    made = function(m, name, positional, named, here)
    return Term(made.op, made.parts, made.value, file, line, made.keys)


def _inherited(
    m: "Machine", base: Term, word: str, positional: list[Term], named: dict[str, Term], here: "Here"
) -> Term | None:
    """What an object's own methods ask of the container that its class derives from: super().__setitem__(key, x)."""
    owner = base.value[1] if base.op == "super" else base
    if word == "__init__":
        name = objects.container(owner.value.kind)
        objects.hold(m, owner, filled(m, name, positional, named, here.file, here.line))
    elif word == "__setitem__" and len(positional) == 2:
        objects.hold(m, owner, Term("store", (owner.value.held, *positional), None, here.file, here.line))
    elif word == "__getitem__" and positional:
        return items.item(m, owner.value.held, positional[0], here.file, here.line)
    else:
        return None
    return constant(None, here.file, here.line)


def method(m: "Machine", base: Term, word: str, positional: list[Term], named: dict[str, Term], here: "Here") -> Term:
    """A method of a value that is not the script's own class."""
    within = objects.held(base)
    if within is not None:
        found = _inherited(m, base, word, positional, named, here)
        if found is not None:
            return found
        base = within
    handler = special.METHODS.get(word)
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
            rest = [elements.element(m, rest[0], here.file, here.line)]
        result = calls.dispatch(m, positional[0], rest, {}, special.inner(here))
        return Term("list", (result,), "comp", here.file, here.line) if word in ("map", "imap", "starmap") else result
    if word == "result" and not positional and base.op != "call":  # of a future, whose value is known
        return base
    if "key" in named and named["key"].op in ("function", "bound") and word == "sort":
        one = elements.element(m, base, here.file, here.line)
        named = {**named, "key": calls.dispatch(m, named["key"], [one], {}, special.inner(here))}
    term = calls.opaque(m, "." + word, [base, *positional], named, here, receiver=True)
    node = here.node
    if word in ("readinto", "readinto1", "recv_into") and positional and node is not None and node.args:
        read = Term("call", (base,), "." + word, here.file, here.line, ("self",))
        place = Term("const", (), ..., here.file, here.line)
        filled = Term("store", (positional[0], place, read), None, here.file, here.line)
        assigning.write_back(m, _beneath(node.args[0]), filled, here.frame)
        return term
    if node is None or not isinstance(node.func, ast.Attribute) or base.op in ("object", "name"):
        return term
    if word in _ADDING and len(positional) + len(named) >= 3:
        index, amount = term.argument(1, "index"), term.argument(2, "src", "source")
        if index is not None and amount is not None:
            changed = _added(base, index, amount, here)
            assigning.write_back(m, node.func.value, changed, here.frame)
            return changed
    in_place = word.endswith("_") and not word.endswith("__")
    if in_place or (here.statement and word in _FILLING):
        changed = Term("mutate", term.parts, "." + word, here.file, here.line, term.keys)
        assigning.write_back(m, node.func.value, changed, here.frame)
        return changed if in_place else term
    return term
