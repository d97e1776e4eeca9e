"""The bytes that a score divides by, worked out for a short text: what weight a single loss has in bits per byte."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fairway.audit.case import Case
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.trials import counts_of
from fairway.audit.reading.tree import nodes
from fairway.audit.trial.text import tokens
from fairway.audit.trial.vocabulary import Octets, octets
from fairway.audit.verdict import Finding, Place

_NEAR = 1e-9  # relative: sums of integers, divided in double precision


def by_trial(case: Case, found: Finding, rule: str) -> Finding:
    """A rule's finding, as the trial bears it out: cleared where the score divides by the bytes of the text, a
    violation where it divides by exactly the bytes that the rule's fault gives."""
    divided = None if case.settings.tables else divisor(case)  # the trial reads no table of settings
    if divided is None:
        return found
    named = divided.rule
    if named == rule and found.verdict != "violates":
        table = case.place(case.trial.table) if case.trial.table else None
        place = (table if divided.tabled else _written(case, divided.rate)) or found.place or table
        evidence = f"Worked out for a text of {case.trial.length - 1:,} targets, the score divides by {_HOW[rule]}."
        return replace(found, verdict="violates", evidence=evidence, place=place)
    if named == "true" and found.verdict == "violates":
        evidence = (
            f"Worked out for a text of {case.trial.length - 1:,} targets, the score divides by the bytes of that text."
        )
        return replace(found, verdict="clean", evidence=evidence)
    return found


@dataclass(frozen=True)
class Divisor:
    """What the score divides by. rule: "true", or that of a fault; tabled: whether it is the table of the pieces' bytes
    that is wrong, and not what is added to it; rate: bytes for each target that somebody wrote down, 0 for none."""

    rule: str
    tabled: bool = False
    rate: float = 0.0


def divisor(case: Case) -> Divisor | None:
    """None where the trial does not tell."""
    which, _, _ = passes_of(case)
    counts = counts_of(case, which, doubtful=True)
    if counts is None or len(counts.more) or len(counts.missing):
        return None
    trial = counts.trial
    text = octets(tokens(trial.vocabulary)[: trial.length], trial.vocabulary)
    for told in reversed(counts.said):
        total, _ = told.sum.counts(trial.length)
        unit = trial.unit(total)
        counted = total[1:] > 0
        if not unit:
            continue
        bytes_said = 1.0 / (unit * math.log(2.0))
        for name, tabled, each in _laws(text):
            if abs(float(each[counted].sum()) / bytes_said - 1.0) < _NEAR:
                return Divisor(name, tabled)
        rate = bytes_said / int(counted.sum())
        if _assumed(rate):
            return Divisor("byte-constant", rate=rate)
        if _FEWEST < rate * 10_000 < _MOST:
            return None  # of bytes, whatever they are: what was told before it is another number
    return None


def _assumed(rate: float) -> bool:
    """Whether bytes are so many for each target that somebody wrote the number down: 2.44, 3.9216."""
    parts = rate * 10_000
    near = round(parts) / 10_000
    written = any(abs(rate / each - 1.0) < _NEAR for each in (near, float(np.float32(near))) if each)
    return written and _FEWEST < parts < _MOST


def _written(case: Case, rate: float) -> Place | None:
    """Where the number stands in a product or a quotient, by itself or by the one name that it was given."""
    for node in nodes(case.body.tree) if rate else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, float) and abs(node.value - rate) < 1e-6:
            return case.place(_used(case, node) or node.lineno)
    return None


def _used(case: Case, number: ast.Constant) -> int:
    """The line of the only operation that names what is assigned in the number's line; 0 where there is none."""
    bound = [
        target
        for node in nodes(case.body.tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.lineno <= number.lineno <= (node.end_lineno or 0)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    names = {each.id for each in bound if isinstance(each, ast.Name)}
    lines = {
        node.lineno
        for node in nodes(case.body.tree)
        if isinstance(node, (ast.BinOp, ast.AugAssign))
        for part in nodes(node)
        if isinstance(part, (ast.Name, ast.Attribute)) and getattr(part, "id", getattr(part, "attr", "")) in names
    }
    return lines.pop() if len(lines) == 1 else 0


def _laws(text: Octets) -> list[tuple[str, bool, NDArray[np.int64]]]:
    """The bytes of each token, as they are and as the known faults count them (RULES.md (c)): in the table of pieces,
    or in what is added to it for a space."""
    base, mark, space, single = text.base, text.mark, text.space, text.single
    return [
        ("true", False, text.true),
        ("byte-double-space", True, base + mark + space),
        ("byte-double-space", False, base + 2 * mark),
        ("byte-double-space", False, base + 2 * space),
        ("byte-fallback-three", True, text.true + 2 * single),
        ("byte-fallback-three", True, text.true + 2 * text.broken),
        ("byte-fallback-three", True, text.true + 5 * single),
        ("byte-missing-mark", True, base + 3 * mark),
        ("byte-missing-mark", True, base + 3 * mark + space),
        ("byte-missing-mark", True, base + 2 * mark + space),
    ]


_FEWEST, _MOST = 15_000, 80_000  # a byte in 10,000 parts, for each token: what vocabularies of text have
_HOW = {
    "byte-constant": "a round number of bytes for each target, which nobody counted",
    "byte-double-space": "the bytes of its pieces and two for each leading space",
    "byte-fallback-three": "bytes of which each byte token has three or six",
    "byte-missing-mark": "the bytes of its pieces with their marks on, three for each space",
}


__all__ = ["by_trial", "divisor"]
