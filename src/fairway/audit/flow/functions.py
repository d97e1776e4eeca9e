"""The script's own functions, walked through with the values they are given."""

from __future__ import annotations

import ast
from typing import Any

from fairway.audit.flow.core import DEPTH, Frame
from fairway.audit.flow.foreign import Foreign
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.iteration import plain_section
from fairway.audit.flow.values import MISSING, NONE, NOTHING, Value, blend, join
from fairway.audit.reading.tree import is_generator, nodes, own

_RECURSION = 2  # times a function may stand within itself
_SECTIONS = 5  # the same of one that takes settings section by section


class Functions(Foreign):
    """inline(function, args)"""

    def block(self, body: list[ast.stmt]) -> bool:
        raise NotImplementedError

    def inline(self, obj: Obj, args: list[Value], kwargs: dict[str, Value], node: ast.AST | None) -> Value:
        """Walk through a function with the values it is given."""
        code, script, scope, closure, owner = obj.data
        depth = sum(1 for each in self.frames if each.node is code)
        if len(self.frames) >= DEPTH or depth >= (_RECURSION if not depth or not _of_sections(args) else _SECTIONS):
            flats = [self.flat(each) for each in (*args, *kwargs.values())]
            if len(self.frames) >= DEPTH:
                self.unknown(node, "calls nested too deeply")
            return blend(*flats).but(const=MISSING) if flats else NOTHING
        local = self.heap.new("frame", getattr(code, "name", "lambda"))
        frame = Frame(local, script, scope, closure, code, owner, _outside(code))
        if node is not None and self.frames:
            self.frame.line = getattr(node, "lineno", self.frame.line)
        self._bind(obj, code.args, local, _spread(code.args, args, node), kwargs)
        if _is_coroutine(code):
            return self.ref(self.new("generator", frame, node))
        if id(node) in self.entering and _is_context(code):
            frame.within = self.entering.pop(id(node))
        nest, frame.line = len(self.nest), code.lineno
        self.frames.append(frame)
        try:
            if isinstance(code, ast.Lambda):
                return self.evaluate(code.body)
            alive = self.block(code.body)
            return self._returned(frame, alive, code)
        finally:
            self.frames.pop()
            del self.nest[nest:]

    def _returned(self, frame: Frame, alive: bool, code: Any) -> Value:
        definite = frame.value
        values = [value for value, _ in frame.returns]
        pending = [change for _, change in frame.returns]
        self.settle(pending, alive or definite is not None)
        if definite is not None:
            values.append(definite)
        elif (alive and not values) or (alive and not all(value.items is not None or value.refs for value in values)):
            values.append(NONE)
        if frame.yields or is_generator(code):
            made = self.new("generator", code.name, code)
            if frame.yields:
                elem = frame.yields[0]
                for each in frame.yields[1:]:
                    elem = join(elem, each)
                made.slots["#elem"] = elem
            for each in values:
                self.add_content(made, each, "#result")
            return self.ref(made)
        if not values:
            return NOTHING
        result = values[0]
        for each in values[1:]:
            result = join(result, each)
        return result

    def _bind(self, obj: Obj, spec: ast.arguments, local: Obj, args: list[Value], kwargs: dict[str, Value]) -> None:
        names = [each.arg for each in (*spec.posonlyargs, *spec.args)]
        slots, defaults = local.slots, obj.slots.get("#defaults", {})
        for name, value in zip(names, args, strict=False):
            slots[name] = value
        rest = args[len(names) :]
        if spec.vararg:
            slots[spec.vararg.arg] = Value(items=tuple(rest))
        known = {*names, *(each.arg for each in spec.kwonlyargs)}
        extra = self.heap.new("dict", None)
        for name, value in kwargs.items():
            if name in known:
                slots[name] = value
            elif name == "**":
                for each in known:
                    if each not in slots:
                        slots[each] = join(value, defaults[each]) if each in defaults else value
            else:
                extra.slots[("k", name)] = value
        if spec.kwarg:
            slots[spec.kwarg.arg] = self.ref(extra)
        for name in known:
            if name not in slots:
                slots[name] = defaults.get(name, NOTHING)


def _spread(spec: ast.arguments, args: list[Value], node: ast.AST | None) -> list[Value]:
    """The arguments of f(x, *many, last), where one item stands for all of a list whose length nobody knows: it goes to
    as many names as leave the others theirs, up to the one that the last argument is called by."""
    given: list[ast.expr] = node.args if isinstance(node, ast.Call) else []
    stars = [n for n, each in enumerate(given) if isinstance(each, ast.Starred)]
    this = len(args) - len(given)  # the object of a method
    if len(stars) != 1 or this not in (0, 1):
        return args
    names = [each.arg for each in (*spec.posonlyargs, *spec.args)]
    last = getattr(given[-1], "id", "")
    required = len(names) - len(spec.defaults)
    total = names.index(last) + 1 if last in names else required if required >= len(args) else len(names)
    at, more = stars[0] + this, max(total - len(args), 0)
    return [*args[:at], *[args[at]] * (1 + more), *args[at + 1 :]]


def _outside(code: Any) -> frozenset[str]:
    """The names that a function declares global or nonlocal."""
    cached = getattr(code, "_fairway_outside", None)
    if cached is None:
        declared = own(code.body if isinstance(code.body, list) else ())
        names = (each.names for each in declared if isinstance(each, (ast.Global, ast.Nonlocal)))
        cached = frozenset(name for each in names for name in each)
        code._fairway_outside = cached
    return cached


def _is_context(code: Any) -> bool:
    """Whether a function is a @contextmanager."""
    return any(ast.unparse(each).endswith("contextmanager") for each in getattr(code, "decorator_list", ()))


def _is_coroutine(code: Any) -> bool:
    """Whether a function uses what is sent to it: a yield that is not a statement of its own."""
    cached = getattr(code, "_fairway_coroutine", None)
    if cached is None:
        cached = False
        if is_generator(code) and isinstance(code, ast.FunctionDef):
            alone = {id(each.value) for each in nodes(code) if isinstance(each, ast.Expr)}
            cached = any(isinstance(each, ast.Yield) and id(each) not in alone for each in nodes(code))
        code._fairway_coroutine = cached
    return bool(cached)


def _of_sections(args: list[Value]) -> bool:
    """Whether one section of settings is handed over: AttrDict(values)."""
    refs = [obj for each in args for obj in each.refs if obj.kind == "dict"]
    return len(refs) == 1 and plain_section(refs[0])


__all__ = ["Functions"]
