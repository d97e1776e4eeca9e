"""An index in its parts, and what a loop goes through."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from fairway.audit.flow.linear import difference
from fairway.audit.flow.values import CLIPPED, MISSING, Value


@dataclass(frozen=True)
class Part:
    """One element of an index: a value, or a slice from low to high."""

    value: Value | None = None
    low: Value | None = None
    high: Value | None = None
    low_text: str = ""
    high_text: str = ""
    slice: bool = False
    step: int = 1  # written out: [::2]


@dataclass(frozen=True)
class Elements:
    """What a loop goes through: the elements one by one, or one that stands for all; count: None where unknown."""

    exact: tuple[Value, ...] | None
    any: Value
    count: int | None = None
    counted: bool = False  # `any` is the number of the iteration, from `first` to `last`
    first: int | None = None
    last: int | None = None


def bound_of(value: Value, text: str) -> str:
    """The text of an end of a slice; "~" before it where it is measured from the end of the data."""
    return f"~{text}" if value.flags & CLIPPED and text and not text.startswith("~") else text


def sym_of(value: Value, node: ast.AST | None = None) -> str:
    """How a number was computed, as text."""
    if value.const is not MISSING and isinstance(value.const, (int, float)):
        return repr(value.const)
    if value.sym:
        return value.sym
    return ast.unparse(node)[:60] if isinstance(node, ast.expr) and _small(node) else ""


def _small(node: ast.expr) -> bool:
    return sum(1 for _ in zip(ast.walk(node), range(30), strict=False)) < 30


def overlaps(low: Value, high: Value) -> bool:
    """Whether windows [w : w + length], w in steps of `unit`, are longer than their step: both are constants."""
    length = re.search(r"add\([^(),]*,(\d+)\)", high.sym)
    step = low.unit
    return bool(low.spans) and length is not None and step.isdigit() and int(length[1]) > 1.5 * int(step) > 1.5


def step_of(low: Value, high: Value) -> int:
    """The step of windows [end - length : end] that are longer than it; 0 where numbers do not say so."""
    length = difference(high.sym, low.sym) if low.spans and low.unit.isdigit() else None
    return int(low.unit) if length is not None and length > 1.5 * int(low.unit) > 1.5 else 0


def sparse(low: Value, high: Value) -> bool:
    """Whether windows [w : w + length], w in steps of `unit`, are shorter than their step: both are constants."""
    lengths = [int(each) for each in re.findall(r"add\([^(),]*,(\d+)\)", high.sym)]
    if low.unit.isdigit() and lengths:
        return int(low.unit) >= 2 * max(lengths) > 2
    index = re.fullmatch(r"mult\((\w+|@),(\w+)\)", low.sym)  # ci * chunk : (ci + 1) * chunk, ci in steps of 4
    above = index is not None and f"mult(add({index[1]},1),{index[2]})" in high.sym
    return above and low.unit.isdigit() and int(low.unit) > 1


def one_key(base: Value, parts: list[Part]) -> list[Part]:
    """Of a dict `classes[role, kind]` is what stands under one key, where both are known."""
    if len(parts) < 2 or not base.refs or any(obj.kind != "dict" for obj in base.refs):
        return parts
    names = [part.value.const if part.value is not None and not part.slice else MISSING for part in parts]
    return parts if any(name is MISSING for name in names) else [Part(Value(const=tuple(names)))]
