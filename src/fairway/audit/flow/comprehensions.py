"""Comprehensions, and the numbers that loops have."""

from __future__ import annotations

import ast
from typing import Any

from fairway.audit.flow.calls import Calls
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.indices import Elements
from fairway.audit.flow.iteration import ARGUMENTS
from fairway.audit.flow.names import Side, side_of
from fairway.audit.flow.values import (
    MISSING,
    NOTHING,
    REPEATS,
    Value,
    hashable,
)
from fairway.audit.reading.tree import last_name, nodes

_OTHER_SPLIT = {"val": "train", "train": "val"}


class Comprehensions(Calls):
    """A comprehension is a loop whose results are kept."""

    def name(self, name: str) -> Value:
        raise NotImplementedError

    def truth(self, value: Value) -> bool | None:
        raise NotImplementedError

    def _on_ListComp(self, node: ast.ListComp) -> Value:
        return self._comprehended(node, [node.elt])

    _on_SetComp = _on_GeneratorExp = _on_ListComp

    def _on_DictComp(self, node: ast.DictComp) -> Value:
        return self._comprehended(node, [node.key, node.value])

    def _comprehended(self, node: Any, results: list[ast.expr]) -> Value:
        mapping = len(results) == 2
        new = self.heap.new("dict" if mapping else "list", None, tuple(self.nest), self.place(node))
        found: list[list[Value]] = []
        before, self.unrolled = self.unrolled, ARGUMENTS if _moves(node) else self.unrolled
        try:
            exact = self._clauses(node.generators, 0, results, found)
        finally:
            self.unrolled = before
        limit = None
        if exact and not mapping and len(found) <= 24:
            new.slots["#items"] = Value(items=tuple(each[0] for each in found))
            return self.ref(new)
        for each in found:
            if mapping and each[0].const is not MISSING and hashable(each[0].const) and exact:
                new.slots[("k", each[0].const)] = each[1]
            else:
                self.add_content(new, each[-1], "#elem")
                if mapping:
                    self.add_content(new, each[0], "#keys")
                limit = each[-1].limit
        if limit is not None and "#elem" in new.slots:
            new.slots["#elem"] = new.slots["#elem"].but(limit=limit)
        return self.ref(new)

    def _clauses(
        self, clauses: list[ast.comprehension], n: int, results: list[ast.expr], found: list[list[Value]]
    ) -> bool:
        """Walk the loops of a comprehension; True where each element stands alone."""
        if n == len(clauses):
            born = tuple(self.nest[: len(self.nest) - n])
            found.append([self.repeats(self.evaluate(each), born) for each in results])
            return True
        clause = clauses[n]
        elements = self.elements(self.evaluate(clause.iter), clause.iter)
        elements = self._small_range(elements)
        alone = elements.exact is not None
        turns = (
            list(elements.exact) if elements.exact is not None else [elements.any] * (2 if elements.count != 1 else 1)
        )
        if elements.count == 0:
            return True
        loop = self.loop_id(clause)
        self.turns[loop] = elements.count if elements.count is not None else 2
        for turn, element in enumerate(turns, start=1):
            self.nest.append((loop, turn))
            self.assign(clause.target, element if alone else self.turned(element, loop, turn))
            kept, picked = True, 0
            for test in clause.ifs:
                self.narrow(test)
                told = self.evaluate(test)
                held = self.truth(told)
                picked |= told.choices
                alone = alone and held is not None
                kept = kept and held is not False
            if kept:
                before = len(found)
                alone = self._clauses(clauses, n + 1, results, found) and alone
                if picked:  # next(each for each in averages if each.decay == best)
                    found[before:] = [[self._chosen_from(each, picked) for each in row] for row in found[before:]]
            self.nest.pop()
            same = elements.exact is None and not alone  # the one that stands for all, in another turn
            if same and found and any("#module" in obj.slots for value in found[-1] for obj in value.refs):
                break
        return alone

    def narrow(self, test: ast.expr) -> dict[str, Value]:
        """`name.startswith("fineweb_val_")`: what the test lets through is named so, or is of the class that it asks
        for. The names' values before."""
        before = self._of_asked_class(test)
        denied = {
            id(part)
            for each in nodes(test)
            if isinstance(each, ast.UnaryOp) and isinstance(each.op, ast.Not)
            for part in nodes(each)
        }
        for each in nodes(test):
            name, text = None, None
            if isinstance(each, ast.Call) and (matched := _matched(each)) is not None:
                about, pattern, rest = matched
                names = [part.id for part in nodes(about) if isinstance(part, ast.Name)]
                name = next((part for part in names if part in self.frame.obj.slots), None)
                told = self.flat(self.evaluate(pattern))
                text = told.const if isinstance(told.const, str) else "".join(map(str, told.words[-1:])) or None
                text = f"{text}{rest}" if text is not None else None
            elif isinstance(each, ast.Compare) and isinstance(each.ops[0], ast.In):
                where = each.comparators[0]
                name, text = getattr(where, "id", None), self.evaluate(each.left).const
            elif isinstance(each, ast.Compare) and isinstance(each.ops[0], ast.NotIn):
                names = [part.id for part in nodes(each.comparators[0]) if isinstance(part, ast.Name)]
                left = self.evaluate(each.left).const
                side = side_of(left) if isinstance(left, str) else ""
                if isinstance(each.left, ast.Name):  # path not in set(glob(...))
                    own = self._side_of(self.name(each.left.id))  # of one split already: these are its other files
                    names, side = [each.left.id], "" if own else self._side_of_all(self.evaluate(each.comparators[0]))
                name = next((part for part in names if part in self.frame.obj.slots), None)
                text = _OTHER_SPLIT.get(side)  # of two splits it leaves the other
            if id(each) in denied and isinstance(text, str):
                text = _OTHER_SPLIT.get(side_of(text))
            if name is not None and isinstance(text, str) and name in self.frame.obj.slots:
                old = self.name(name)
                if old.const is MISSING and (self.plain(old) or any("#path" in obj.slots for obj in old.refs)):
                    before.setdefault(name, old)
                    self.assign(ast.Name(name, ast.Store()), self._also_named(old, text, test))
        return before

    def _of_asked_class(self, test: ast.expr) -> dict[str, Value]:
        """`isinstance(module, Linear)`, and what else must hold: of several objects those of the class are left."""
        before: dict[str, Value] = {}
        for each in test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else (test,):
            if not (isinstance(each, ast.Call) and last_name(each.func) == "isinstance" and len(each.args) == 2):
                continue
            name = getattr(each.args[0], "id", "")
            old = self.name(name) if name in self.frame.obj.slots else NOTHING
            asked = self.evaluate(each.args[1])
            classes = [obj for part in (asked, *(asked.items or ())) for obj in part.refs]
            fitting = frozenset(obj for obj in old.refs if any(self._is_one_of(obj, kind) for kind in classes))
            if 0 < len(fitting) < len(old.refs):
                before.setdefault(name, old)
                self.assign(ast.Name(name, ast.Store()), old.but(refs=fitting))
        return before

    def _is_one_of(self, obj: Obj, kind: Obj) -> bool:
        """Of a class of the script, or of another library: `<thing torch.nn.Linear>`."""
        line = self.line_of(obj.data) if obj.kind == "instance" else []
        return kind in line or (kind.kind == "foreign" and kind.data in (obj.data, *(each.data for each in line)))

    def _side_of_all(self, held: Value) -> Side:
        """The split that all paths of a list are of; "" where they are of both, or where nobody knows."""
        return self._side_of(self.elements(held, None).any) if held.refs else ""

    def _side_of(self, path: Value) -> Side:
        sides: set[Side] = {side for word in self.piece_of_path(path, "").words if (side := side_of(word))}
        return sides.pop() if len(sides) == 1 else ""

    def _also_named(self, old: Value, text: str, node: ast.expr) -> Value:
        """A name, or a path, of which a test has told more."""
        if not old.refs:
            return old.but(words=(*old.words, text)[-10:])
        return self.path([Value(words=(*self.piece_of_path(old, "").words, text)[-10:])], node)

    @staticmethod
    def _small_range(elements: Elements) -> Elements:
        """A short range, number by number."""
        count, first, last = elements.count, elements.first, elements.last
        if elements.exact is not None or not elements.counted or count is None or not 1 <= count <= 6:
            return elements
        step = (last - first) // (count - 1) if count > 1 and first is not None and last is not None else 1
        return Elements(tuple(Value(const=(first or 0) + n * step) for n in range(count)), elements.any, count)

    def turned(self, element: Value, loop: int, turn: int) -> Value:
        """The element that an iteration of a loop takes; what a list holds several times is the same each time."""
        if element.flags & REPEATS:
            return element
        if element.items is not None and not element.refs:
            return element.but(items=tuple(self.turned(item, loop, turn) for item in element.items))
        return self.tagged(element, ((loop, turn, turn),))

    def loop_id(self, node: ast.AST) -> int:
        """The loop's number."""
        found = getattr(node, "_fairway_loop", None)
        if found is None:
            found = len(self.trace.loops) + 1
            node._fairway_loop = found  # type: ignore[attr-defined]
        self.trace.loops.setdefault(found, self.place(getattr(node, "iter", node)))
        self.trace.within.setdefault(found, id(self.frame.node))
        self.trace.depth[found] = min(self.trace.depth.get(found, len(self.calls)), len(self.calls))
        return int(found)


def _moves(node: ast.AST) -> bool:
    """`t.to(device) for t in (x, y, mask)`: each by itself, and nothing else is done to it."""
    if not isinstance(node, (ast.GeneratorExp, ast.ListComp)) or len(node.generators) != 1:
        return False
    of = getattr(node.elt, "func", None)
    target = getattr(node.generators[0].target, "id", "")
    return isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) and of.value.id == target


def _matched(call: ast.Call) -> tuple[ast.expr, ast.expr, str] | None:
    """What a call tests, with what pattern, and what may follow it; None for a call that is no test of a text."""
    function, args = call.func, call.args
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("fnmatch", "fnmatchcase") and len(args) == 2:
        return args[0], args[1], ""
    if name in ("match", "search", "fullmatch") and len(args) >= 2:  # re.match(pattern, name)
        return args[1], args[0], ""
    if name in ("startswith", "endswith", "match") and args and isinstance(function, ast.Attribute):
        return function.value, args[0], "*" if name == "startswith" else ""
    return None
