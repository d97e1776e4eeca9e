"""match: which case a value meets, and what its pattern binds."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from fairway.audit.flow.expressions import Expressions
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.values import MISSING, Value, join

Bound = dict[str, Value]
_BUILTIN = {"int": int, "float": float, "str": str, "bool": bool, "bytes": bytes}
_SOLID = frozenset(("instance", "dict", "list", "tensor", "class", "function"))


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """False where one fails, True where all hold, None where that is not known."""
    found = list(verdicts)
    return False if False in found else None if None in found else True


class Patterns(Expressions):
    """matched(pattern, value, bound): True, False, or None where it is not known; fills `bound`."""

    def matched(self, pattern: ast.pattern, value: Value, bound: Bound) -> bool | None:
        if isinstance(pattern, ast.MatchAs):
            held = self.matched(pattern.pattern, value, bound) if pattern.pattern is not None else True
            if pattern.name:
                bound[pattern.name] = value
            return held
        if isinstance(pattern, ast.MatchValue):
            return self._equals(value, self.evaluate(pattern.value))
        if isinstance(pattern, ast.MatchSingleton):
            return self._equals(value, Value(const=pattern.value))
        if isinstance(pattern, ast.MatchOr):
            return self._alternatives(pattern.patterns, value, bound)
        if isinstance(pattern, ast.MatchSequence):
            return self._sequence(pattern.patterns, value, bound)
        if isinstance(pattern, ast.MatchMapping):
            return self._mapping(pattern, value, bound)
        if isinstance(pattern, ast.MatchClass):
            return self._class(pattern, value, bound)
        return None

    @staticmethod
    def _equals(value: Value, wanted: Value) -> bool | None:
        if value.const is not MISSING and wanted.const is not MISSING:
            return bool(value.const == wanted.const)
        solid = value.items is not None or any(obj.kind in _SOLID for obj in value.refs)
        return False if solid and value.const is MISSING and wanted.const is not MISSING else None

    def _alternatives(self, patterns: list[ast.pattern], value: Value, bound: Bound) -> bool | None:
        verdict: bool | None = False
        for each in patterns:
            own: Bound = {}
            held = self.matched(each, value, own)
            if held is False:
                continue
            for name, found in own.items():
                bound[name] = join(bound[name], found) if name in bound else found
            verdict = held
            if held:
                break
        return verdict

    def _sequence(self, patterns: list[ast.pattern], value: Value, bound: Bound) -> bool | None:
        if isinstance(value.const, (str, bytes, int, float, bool)) or value.const is None:
            return False
        if value.refs and all(obj.kind in ("instance", "dict", "class") for obj in value.refs):
            return False
        elements = self.elements(value, None)
        exact = value.items if value.items is not None and not value.refs else elements.exact
        stars = [n for n, each in enumerate(patterns) if isinstance(each, ast.MatchStar)]
        if exact is None:
            for each in patterns:
                self._star(each, value, bound)
            rest = [each for each in patterns if not isinstance(each, ast.MatchStar)]
            held = all_of(self.matched(each, elements.any, bound) for each in rest)
            return False if held is False else None
        if len(exact) < len(patterns) - len(stars) or (not stars and len(exact) > len(patterns)):
            return False
        if not stars:
            return all_of([self.matched(each, item, bound) for each, item in zip(patterns, exact, strict=True)])
        star, after = stars[0], len(patterns) - stars[0] - 1
        end = len(exact) - after
        self._star(patterns[star], Value(items=tuple(exact[star:end])), bound)
        pairs = [*zip(patterns[:star], exact, strict=False), *zip(patterns[star + 1 :], exact[end:], strict=False)]
        return all_of([self.matched(each, item, bound) for each, item in pairs])

    @staticmethod
    def _star(pattern: ast.pattern, value: Value, bound: Bound) -> None:
        if isinstance(pattern, ast.MatchStar) and pattern.name:
            bound[pattern.name] = value

    def _mapping(self, pattern: ast.MatchMapping, value: Value, bound: Bound) -> bool | None:
        dicts = [obj for obj in value.refs if obj.kind == "dict"]
        if not dicts:
            return False if value.const is not MISSING or value.items is not None else None
        verdicts: list[bool | None] = [True if len(dicts) == len(value.refs) == 1 else None]
        for key, each in zip(pattern.keys, pattern.patterns, strict=True):
            name = self.evaluate(key).const
            found = [obj.slots[("k", name)] for obj in dicts if ("k", name) in obj.slots]
            more = [obj.slots["#elem"] for obj in dicts if "#elem" in obj.slots]
            if not found and not more:
                return False
            possible = found or more
            held = possible[0]
            for other in possible[1:]:
                held = join(held, other)
            verdicts.append(self.matched(each, held, bound))
            if not found:
                verdicts.append(None)
        if pattern.rest:
            bound[pattern.rest] = value
        return all_of(verdicts)

    def _class(self, pattern: ast.MatchClass, value: Value, bound: Bound) -> bool | None:
        wanted = self.evaluate(pattern.cls)
        classes = [obj for obj in wanted.refs if obj.kind == "class"]
        if not classes:
            return self._builtin(pattern, value, wanted, bound)
        fitting = frozenset(
            obj for obj in value.refs if obj.kind == "instance" and any(c in self.line_of(obj.data) for c in classes)
        )
        if not fitting:
            solid = value.const is not MISSING or value.items is not None or value.refs
            return False if solid else None
        narrowed = value.but(refs=fitting)
        names = [*self._places(classes[0])[: len(pattern.patterns)], *pattern.kwd_attrs]
        verdicts: list[bool | None] = [True if fitting == value.refs else None]
        for name, each in zip(names, [*pattern.patterns, *pattern.kwd_patterns], strict=False):
            verdicts.append(self.matched(each, self.get(narrowed, name, pattern), bound))
        return all_of(verdicts)

    def _builtin(self, pattern: ast.MatchClass, value: Value, wanted: Value, bound: Bound) -> bool | None:
        """A class of the language or of a library: `int(n)`, `torch.Tensor()`."""
        for each in pattern.patterns[:1]:
            self.matched(each, value, bound)
        for name, each in zip(pattern.kwd_attrs, pattern.kwd_patterns, strict=True):
            self.matched(each, self.get(value, name, pattern), bound)
        kind = next((_BUILTIN.get(str(obj.data).rsplit(".", 1)[-1]) for obj in wanted.refs), None)
        if kind is not None and value.const is not MISSING:
            return isinstance(value.const, kind)
        if kind is not None and (value.items is not None or any(obj.kind in _SOLID for obj in value.refs)):
            return False
        return None

    def _places(self, cls: Obj) -> tuple[str, ...]:
        """The attributes that a class pattern's positions stand for: `__match_args__`, else its fields."""
        said = self.find(cls, "__match_args__")
        exact = said[0].items if said is not None else None
        if exact is not None:
            return tuple(str(each.const) for each in exact)
        return tuple(dict.fromkeys(f for each in reversed(self.line_of(cls)) for f in each.slots.get("#fields", ())))


__all__ = ["Bound", "Patterns"]
