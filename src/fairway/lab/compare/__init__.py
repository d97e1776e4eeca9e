"""Approaches held against a baseline: what several seeds and many documents allow to say of them."""

from fairway.lab.compare.approaches import Approach, LeftOut, approaches, gather
from fairway.lab.compare.comparison import compare
from fairway.lab.compare.result import Against, Compared, Comparison, Documents, Seeds
from fairway.lab.compare.tables import markdown, tables

__all__ = [
    "Against",
    "Approach",
    "Compared",
    "Comparison",
    "Documents",
    "LeftOut",
    "Seeds",
    "approaches",
    "compare",
    "gather",
    "markdown",
    "tables",
]
