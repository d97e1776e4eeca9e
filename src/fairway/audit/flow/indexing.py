"""What an index says: its parts, the turns of the loops that it hangs on, and the part of a window that it leaves."""

from __future__ import annotations

import ast

from fairway.audit.flow.classes import Classes
from fairway.audit.flow.indices import Part, bound_of, sym_of
from fairway.audit.flow.tokens import START, Cut, Span
from fairway.audit.flow.values import Value


class Indexing(Classes):
    """parts(node), slice_spans(part), cuts_of(parts)"""

    def parts(self, node: ast.expr) -> list[Part]:
        """The elements of a subscript."""
        elements = node.elts if isinstance(node, ast.Tuple) else [node]
        found = []
        for each in elements:
            if isinstance(each, ast.Slice):
                low = self.evaluate(each.lower) if each.lower else None
                high = self.evaluate(each.upper) if each.upper else None
                step = each.step.value if isinstance(each.step, ast.Constant) else 1
                if each.step:
                    self.evaluate(each.step)
                low_text = sym_of(low, each.lower) if low else ""
                high_text = sym_of(high, each.upper) if high else ""
                found.append(Part(None, low, high, low_text, high_text, True, step if isinstance(step, int) else 1))
            elif isinstance(each, ast.Starred):
                found.append(Part(self.evaluate(each.value)))
            else:
                found.append(self._one_part(self.evaluate(each)))
        return found

    @staticmethod
    def _one_part(value: Value) -> Part:
        """An index that was evaluated: slice(a, b) is a slice too."""
        for obj in value.refs:
            if obj.kind == "slice":
                (low, *more), texts = obj.data
                high = more[0] if more else None
                low = None if low.const is None else low
                high = None if high is None or high.const is None else high
                low_text = sym_of(low) or (texts[0] if texts else "") if low is not None else ""
                high_text = sym_of(high) or (texts[1] if len(texts) > 1 else "") if high is not None else ""
                return Part(None, low, high, low_text, high_text, True)
        return Part(value)

    def slice_spans(self, part: Part) -> tuple[Span, ...]:
        """The iterations that a slice is cut by: from its start, as far as its end."""
        low = part.low.spans if part.low else ()
        high = {loop: (a, b) for loop, a, b in part.high.spans} if part.high else {}
        if low and part.low is not None and part.low.less:
            low = self._ending(low, high)
        if low:
            return self.reaching(low, high)
        if part.low is None or part.low.const == 0:
            return tuple((loop, START, a - 1) if a == b else (loop, START, b) for loop, (a, b) in high.items())
        return tuple((loop, a, b) for loop, (a, b) in high.items())

    def reaching(self, low: tuple[Span, ...], high: dict[int, tuple[int, int]]) -> tuple[Span, ...]:
        """The iterations from a start as far as an end."""
        part_of = {loop: 0 if self._holds_end(loop, low, high) else 1 for loop, _, _ in low}
        return tuple(
            (loop, a, max(b, high[loop][1] - part_of[loop]) if loop in high and high[loop][1] > b else b)
            for loop, a, b in low
        )

    def _holds_end(self, loop: int, low: tuple[Span, ...], high: dict[int, tuple[int, int]]) -> bool:
        """Whether an end is the end of what a list holds for a turn, as a start is the start of it: `chunks[c][0].begin
        : chunks[c + 1][-1].end`; an end that is where the next one starts holds nothing of it."""
        under_way = {each for each, _ in self.nest}
        ended = [(each, a) for each, a, _ in low if each != loop and each not in under_way]
        return any(each in high and high[each][0] > a for each, a in ended)

    def _ending(self, low: tuple[Span, ...], high: dict[int, tuple[int, int]]) -> tuple[Span, ...]:
        """`[end - context : end]`, where `end` is where the next turn begins: what comes last in it is this turn's."""
        turns = dict(self.nest)
        return tuple(
            (loop, a - 1, b - 1) if a == b == turns.get(loop, a) + 1 and high.get(loop) == (a, b) else (loop, a, b)
            for loop, a, b in low
        )

    def cuts_of(self, parts: list[Part]) -> frozenset[Cut]:
        """The part of a window that slices leave."""
        cuts: set[Cut] = set()
        for part in parts:
            if not part.slice:
                continue
            if part.low is not None and part.low.const not in (0, 1, None) and part.low_text:
                cuts.add(("tail", bound_of(part.low, part.low_text), part.low.less))
            if part.high is not None and part.high.const not in (-1, None) and part.high_text:
                cuts.add(("head", bound_of(part.high, part.high_text), part.high.less))
        return frozenset(cuts)
