"""Names with a dot: what an object, a class, a module of the script's own holds under a name."""

from typing import TYPE_CHECKING, TypeAlias

from fairway.audit.terms import calls, objects
from fairway.audit.terms.elements import element, entries
from fairway.audit.terms.term import Term, alternatives
from fairway.audit.terms.things import Bound, Function, constant

if TYPE_CHECKING:
    from fairway.audit.terms.machine import Machine


Known: TypeAlias = dict[int, tuple[Term, Term]]
"""By the id of a choice: that, and what it holds under the name that is asked for."""


def attribute(m: "Machine", base: Term, word: str, file: str, line: int, known: Known | None = None) -> Term:
    """base.word. known: the choices that were asked on the way here; they share parts, and each is asked once."""
    if base.op == "object":
        if word in base.value.attrs:
            return base.value.attrs[word]
        found = base.value.kind.find(word)
        within = objects.held(base)
        if found is None and within is not None and base.value.kind.find("__getattr__") is not None:
            found = (entries(within) or {}).get(word)  # names that are entries: class Settings(dict)
        if found is None:
            held = objects.table(base, file, line) if word == "__dict__" else None
            return held or Term("attr", (base,), word, file, line)
        return _bound(m, found, base, base, file, line)
    if base.op == "class":
        found = base.value.find(word)
        return (
            _bound(m, found, None, base, file, line) if found is not None else Term("attr", (base,), word, file, line)
        )
    if base.op == "function" and word in base.value.attrs:
        return base.value.attrs[word]
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
    several = base.op in ("choice", "merge") and word not in ("shape", "device", "dtype")
    if several and any(p.op in ("object", "class") for p in alternatives(base, 24)):
        return _of_options(m, base, word, file, line, {} if known is None else known)
    if base.op == "store" and base.value == "attr" and base.parts[1].value == "." + word:
        return base.parts[2]
    if base.op == "call" and base.value in ("min", "max") and base.parts:
        one = element(m, base.parts[0], file, line)
        if one.op in ("object", "merge", "choice"):
            return attribute(m, one, word, file, line)
    if word in m.options and is_parsed(base):
        return m.options[word]
    if word == "__dict__" and is_parsed(base):
        return parsed_table(m, file, line)
    return Term("attr", (base,), word, file, line)


def _of_options(m: "Machine", base: Term, word: str, file: str, line: int, known: Known) -> Term:
    """The name of each value that this may be, None aside."""
    if id(base) in known:
        return known[id(base)][1]
    known[id(base)] = (base, Term("attr", (base,), word, file, line))  # a circle ends here
    options = [p for p in (base.parts[1:] if base.op == "choice" else base.parts) if not nothing(p)]
    found = [attribute(m, p, word, file, line, known) for p in options[:6]]
    if all(term is found[0] for term in found):
        made = found[0]
    elif base.op == "choice" and len(options) == 2:
        made = Term("choice", (base.parts[0], *found), None, file, line)
    else:
        made = Term("merge", tuple(found), None, file, line)
    known[id(base)] = (base, made)
    return made


def is_parsed(term: Term) -> bool:
    """Whether it is what argparse read: parse_args(), the first of parse_known_args()."""
    if term.op == "item" and term.parts[1].constant() == 0:
        return term.parts[0].op == "call" and term.parts[0].called == "parse_known_args"
    return term.op == "call" and term.called == "parse_args"


def parsed_table(m: "Machine", file: str, line: int) -> Term:
    """All options by name: vars(args), args.__dict__."""
    pairs = [part for word, term in m.options.items() for part in (constant(word, file, line), term)]
    return Term("dict", tuple(pairs), None, file, line)


def nothing(term: Term) -> bool:
    return term.op == "const" and term.value is None


def _bound(m: "Machine", found: Term, owner: Term | None, base: Term, file: str, line: int) -> Term:
    """A class's name as its object sees it: a method knows its owner, a property is computed."""
    if found.op == "call" and found.called == "staticmethod" and found.parts and found.parts[0].op == "function":
        return found.parts[0]  # slot = staticmethod(lambda a, b: ...)
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
