"""Lists, tuples, sets, dicts, comprehensions and texts with values in them, turned into closures."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from fairway.audit.trial.host import Compute, Host
from fairway.audit.trial.values import UNKNOWN, Frame, Undecided, Unknown, Value


class Displays:
    """A part of the compiler."""

    host: Host

    def compiled(self, node: ast.expr) -> Compute:
        raise NotImplementedError

    def _list(self, node: ast.List) -> Compute:
        return self._gathered(node.elts, list)

    def _tuple(self, node: ast.Tuple) -> Compute:
        return self._gathered(node.elts, tuple)

    def _set(self, node: ast.Set) -> Compute:
        return self._gathered(node.elts, lambda items: set(hashables(items)))

    def _gathered(self, nodes: list[ast.expr], made: Callable[[list[Value]], Value]) -> Compute:
        parts = [
            (isinstance(each, ast.Starred), self.compiled(each.value if isinstance(each, ast.Starred) else each))
            for each in nodes
        ]
        items = self.host.items

        def gathered(frame: Frame) -> Value:
            found: list[Value] = []
            for starred, part in parts:
                found.extend(items(part(frame))) if starred else found.append(part(frame))
            return made(found)

        return gathered

    def _dict(self, node: ast.Dict) -> Compute:
        parts = [
            (None if key is None else self.compiled(key), self.compiled(value))
            for key, value in zip(node.keys, node.values, strict=True)
        ]

        def made(frame: Frame) -> Value:
            found: dict[Value, Value] = {}
            for key, value in parts:
                if key is None:
                    inner = value(frame)
                    if isinstance(inner, dict):
                        found.update(inner)
                else:
                    name = key(frame)
                    found[name if hashable(name) else id(name)] = value(frame)
            return found

        return made

    def _joinedstr(self, node: ast.JoinedStr) -> Compute:
        parts = [self.compiled(each) for each in node.values]

        def joined(frame: Frame) -> Value:
            found = [part(frame) for part in parts]
            return UNKNOWN if any(isinstance(each, Unknown) for each in found) else "".join(found)[:10_000]

        return joined

    def _formattedvalue(self, node: ast.FormattedValue) -> Compute:
        value, shown, line = self.compiled(node.value), self.host.shown, node.lineno
        spec = self.compiled(node.format_spec) if node.format_spec is not None else None

        def formatted(frame: Frame) -> Value:
            found = value(frame)
            shown(found, line)
            return _formatted(found, str(spec(frame)) if spec is not None else "")

        return formatted

    def _listcomp(self, node: ast.ListComp) -> Compute:
        made = self._comprehended(node.generators, node.elt)
        return lambda frame: list(made(frame))

    def _generatorexp(self, node: ast.GeneratorExp) -> Compute:
        made = self._comprehended(node.generators, node.elt)
        return lambda frame: made(frame)

    def _setcomp(self, node: ast.SetComp) -> Compute:
        made = self._comprehended(node.generators, node.elt)
        return lambda frame: set(hashables(made(frame)))

    def _dictcomp(self, node: ast.DictComp) -> Compute:
        made = self._comprehended(node.generators, ast.Tuple([node.key, node.value], ast.Load()))
        return lambda frame: {key if hashable(key) else id(key): value for key, value in made(frame)}

    def _comprehended(self, generators: list[ast.comprehension], elt: ast.expr) -> Callable[[Frame], Iterator[Value]]:
        value = self.compiled(elt)
        host = self.host
        turns = [
            (self.compiled(each.iter), self.target(each.target), [self.compiled(test) for test in each.ifs])
            for each in generators
        ]

        def run(frame: Frame, depth: int, first: Value = None) -> Iterator[Value]:
            if depth == len(turns):
                yield value(frame)
                return
            source, bind, tests = turns[depth]
            for item in host.items(source(frame) if depth else first):
                host.step()
                bind(frame, item)
                if all(_holds(host, test(frame)) for test in tests):
                    yield from run(frame, depth + 1)

        def made(frame: Frame) -> Iterator[Value]:
            inner = Frame(frame)
            inner.owner, inner.me = frame.owner, frame.me
            return run(inner, 0, turns[0][0](frame))  # as Python does: `lines = (f(each) for each in lines)`

        return made

    def target(self, node: ast.expr) -> Callable[[Frame, Value], None]:
        raise NotImplementedError


def _holds(host: Host, value: Value) -> bool:
    """A filter of a comprehension; one that is not decided lets through."""
    try:
        return host.truth(value)
    except Undecided:
        return True


def hashable(value: Value) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def hashables(items: Iterator[Value] | list[Value]) -> list[Value]:
    return [item for item in items if hashable(item)]


def _formatted(value: Value, spec: str) -> Value:
    if isinstance(value, Unknown):
        return value
    if (
        isinstance(value, (int, float, str))
        and len(spec) < 12
        and not any(part.isdigit() and int(part) > 200 for part in spec.replace(".", " ").split())
    ):
        try:
            return format(value, spec)
        except (ValueError, TypeError):
            return str(value)[:1000]
    return str(value)[:200] if isinstance(value, (int, float, str)) else "?"


__all__ = ["Displays", "hashable", "hashables"]
