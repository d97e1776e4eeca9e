"""Where values go: names, attributes, containers, and whatever was changed in place."""

import ast
from typing import TYPE_CHECKING

from fairway.audit.terms import calls, expressions, objects
from fairway.audit.terms.elements import entries
from fairway.audit.terms.items import item
from fairway.audit.terms.term import Term
from fairway.audit.terms.things import Frame, Instance, constant

if TYPE_CHECKING:
    from fairway.audit.terms.machine import Machine


_INNER = frozenset(("setdefault", "get", "view", "reshape", "flatten", "detach", "view_as", "T", "narrow", "select"))


def assign(m: "Machine", target: ast.expr, term: Term, frame: Frame) -> None:
    if isinstance(target, ast.Name):
        bind(m, target.id, term, frame)
    elif isinstance(target, ast.Starred):
        assign(m, target.value, term, frame)
    elif isinstance(target, (ast.Tuple, ast.List)):
        starred = any(isinstance(part, ast.Starred) for part in target.elts)
        for position, part in enumerate(target.elts):
            where: Term = constant(position, frame.file, target.lineno)
            if starred and isinstance(part, ast.Starred):
                where = Term("slice", (), None, frame.file, target.lineno)
            elif starred and any(isinstance(p, ast.Starred) for p in target.elts[:position]):
                where = constant(position - len(target.elts), frame.file, target.lineno)
            assign(m, part, item(m, term, where, frame.file, target.lineno), frame)
    elif isinstance(target, ast.Attribute):
        set_attribute(m, m.value(target.value, frame), target.attr, term, target, frame)
    elif isinstance(target, ast.Subscript):
        base, index = m.value(target.value, frame), m.value(target.slice, frame)
        within = objects.held(base)
        if within is not None and base.value.kind.find("__setitem__") is None:
            objects.hold(m, base, Term("store", (within, index, term), None, frame.file, target.lineno))
            return
        if base.op in ("object", "bound"):
            calls.method(m, base, "__setitem__", [index, term], base.file, target.lineno)
            return
        if base.op == "name" and base.value == "os.environ" and index.op == "const" and term.op == "const":
            m.settings = calls.with_environment(m.settings, str(index.value), term.value)
            return
        write_back(m, target.value, Term("store", (base, index, term), None, frame.file, target.lineno), frame)


def write_back(m: "Machine", node: ast.expr, term: Term, frame: Frame) -> None:
    """What was changed in place is from now on what its name, attribute or container holds."""
    _, owner = m.holders.get(id(term.parts[0]), (None, None)) if term.op in ("store", "mutate") else (None, None)
    if owner is not None:
        objects.hold(m, owner, term)
        return
    if isinstance(node, ast.Name) and expressions.name(node.id, frame, node.lineno).op == "name":
        return  # a module's name
    if isinstance(node, ast.Name) and node.id not in frame.vars and node.id not in frame.elsewhere:
        home = frame.outer
        while home is not None and node.id not in home.vars:
            home = home.outer
        if home is not None:
            home.vars[node.id] = weakly(m, home.depth, term, home.vars[node.id])
            return
    if isinstance(node, ast.IfExp):  # (a if test else b).append(x)
        test = m.value(node.test, frame)
        for arm in (node.body, node.orelse):
            before = m.value(arm, frame)
            filled = Term(term.op, (before, *term.parts[1:]), term.value, term.file, term.line, term.keys)
            order = (test, filled, before) if arm is node.body else (test, before, filled)
            write_back(m, arm, Term("choice", order, None, term.file, term.line), frame)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        word = node.func.attr  # buffer.mul_(a).add_(b), rows.setdefault(key, {})[token] = n
        if word in _INNER or (word.endswith("_") and not word.endswith("__")):
            write_back(m, node.func.value, term, frame)
    elif isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Name) and term.op in ("store", "mutate"):
            _fill_other_names(m, term, frame)
        assign(m, node, term, frame)


def _fill_other_names(m: "Machine", term: Term, frame: Frame) -> None:
    """`table = TABLE; table[i] = n`: what a name of a function's own has changed is what a name outside holds."""
    home = frame.outer
    while home is not None:
        for name in [name for name, held in home.vars.items() if held is term.parts[0]]:
            home.vars[name] = weakly(m, home.depth, term, home.vars[name])
        home = home.outer


def bind(m: "Machine", name: str, term: Term, frame: Frame) -> None:
    home = frame.elsewhere.get(name, frame)
    if home is frame:
        frame.vars[name] = term
        return
    home.vars[name] = weakly(m, home.depth, term, home.vars.get(name))


def weakly(m: "Machine", depth: int, term: Term, before: Term | None) -> Term:
    """A value stored outside the present frame: a choice, where undecided conditions stand between."""
    test = m.conjunction(depth)
    if test is None or before is None or before is term:
        return term
    return Term("choice", (test, term, before), None, term.file, term.line)


def set_attribute(m: "Machine", base: Term, name: str, term: Term, target: ast.Attribute, frame: Frame) -> None:
    if base.op == "object":
        owner: Instance = base.value
        table = entries(term) if name == "__dict__" else None
        if table is not None:  # settings.__dict__.update(found)
            owner.attrs.update((str(key), value) for key, value in table.items())
            return
        owner.attrs[name] = weakly(m, owner.depth, term, owner.attrs.get(name))
    elif base.op == "class":
        base.value.vars[name] = weakly(m, 0, term, base.value.vars.get(name))
    elif base.op == "namespace":
        base.value.vars[name] = term
    elif base.op in ("choice", "merge"):
        for one in base.parts[1:] if base.op == "choice" else base.parts:
            if one.op == "object":
                before = one.value.attrs.get(name)
                one.value.attrs[name] = (
                    term if before is None else Term("merge", (term, before), None, term.file, term.line)
                )
    elif base.op == "function":
        base.value.attrs[name] = weakly(m, 0, term, base.value.attrs.get(name))
    elif base.op in ("bound", "const"):
        return
    else:
        where = constant("." + name, frame.file, target.lineno)
        changed = Term("store", (base, where, term), "attr", frame.file, target.lineno)
        if isinstance(target.value, ast.Name):
            bind(m, target.value.id, changed, frame)
