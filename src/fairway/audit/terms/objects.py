"""What the script's own objects do where Python asks them: operators, iteration, `with`, copies."""

import ast
from typing import TYPE_CHECKING

from fairway.audit.terms import assigning, attributes, calls
from fairway.audit.terms.term import Term, alternatives
from fairway.audit.terms.things import Class, Instance, constant

if TYPE_CHECKING:
    from fairway.audit.terms.machine import Machine

_WORDS: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "truediv",
    ast.BitOr: "or",
    ast.BitAnd: "and",
    ast.MatMult: "matmul",
    ast.LShift: "lshift",
    ast.RShift: "rshift",
}


def owned(term: Term, limit: int = 6) -> list[Term]:
    """The script's own objects that a value may be."""
    if term.op not in ("object", "choice", "merge"):
        return []
    return [one for one in alternatives(term, limit) if one.op == "object"]


_CONTAINERS = frozenset("dict OrderedDict defaultdict UserDict Counter list UserList deque set".split())  # noqa: SIM905


def container(kind: Class) -> str:
    """The name of the container that a class derives from, or ""."""
    own = next((name for name in kind.outside if name.rsplit(".", 1)[-1] in _CONTAINERS), "")
    return own or next((name for base in kind.bases if (name := container(base))), "")


def held(term: Term) -> Term | None:
    """What lies in an object that is a container itself, or in what `super()` stands for; None for all else."""
    owner = term.value[1] if term.op == "super" else term
    found: Term | None = owner.value.held if owner.op == "object" else None
    return found


def hold(m: "Machine", owner: Term, content: Term) -> None:
    """From now on this lies in the object."""
    instance: Instance = owner.value
    instance.held = assigning.weakly(m, instance.depth, content, instance.held)
    m.holders[id(instance.held)] = (instance.held, owner)


def operated(
    m: "Machine", op: ast.operator, left: Term, right: Term, file: str, line: int, in_place: bool = False
) -> Term | None:
    """left op right by a method of the class of one of them; None where neither has it."""
    word = _WORDS.get(type(op))
    if word is None:
        return None
    forward = (f"__i{word}__", f"__{word}__") if in_place else (f"__{word}__",)
    for mine, other, names in ((left, right, forward), (right, left, (f"__r{word}__",))):
        results = []
        for one in owned(mine):
            name = next((n for n in names if one.value.kind.find(n) is not None), None)
            result = calls.method(m, one, name, [other], file, line) if name is not None else None
            if result is not None:
                results.append(result)
        if results:
            return results[0] if len(results) == 1 else Term("merge", tuple(results), None, file, line)
    return None


def following(m: "Machine", term: Term, file: str, line: int) -> Term | None:
    """What an iterator of the script's own gives next."""
    return calls.method(m, term, "__next__", [], file, line)


def entered(m: "Machine", term: Term, file: str, line: int) -> Term:
    """What `with term as name` binds."""
    found = calls.method(m, term, "__enter__", [], file, line)
    return term if found is None else found


def left(m: "Machine", term: Term, file: str, line: int) -> None:
    """The end of a `with`: no exception has come."""
    calls.method(m, term, "__exit__", [constant(None, file, line)] * 3, file, line)


def changed(m: "Machine", term: Term, named: dict[str, Term], file: str, line: int) -> Term | None:
    """A copy with some of its fields replaced."""
    found = owned(term)
    if not found:
        return None
    old: Instance = found[0].value
    attrs = {word: attributes.attribute(m, term, word, file, line) for word in old.attrs}
    return Term("object", (), Instance(old.kind, {**attrs, **named}, len(m.conditions)), file, line)


def table(term: Term, file: str, line: int) -> Term | None:
    """vars(object), object.__dict__: its attributes by name."""
    if term.op != "object":
        return None
    pairs = [part for word, value in term.value.attrs.items() for part in (constant(word, file, line), value)]
    return Term("dict", tuple(pairs), None, file, line)
