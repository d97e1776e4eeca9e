"""Slot: from weights and scales to codes.

A technique is a module with a frozen `Spec`, a constant `NEEDS_HESSIAN`, and

    solve(weight (rows, cols) float, scales (rows,) float16, bits, hessian (cols, cols) or None, spec,
          dead_zone = 0.0) -> Solution

and, where part of its work depends on the Hessian alone,

    factorise(hessian (cols, cols), spec) -> anything that solve takes in the Hessian's place

One with TAKES_BOOKS = True has a last argument, book = None (quant/books.py): its codes number a book's levels then,
book.nearest(weight / scale) being those of single weights, book.values(codes) what codes stand for.

Promise: codes lie on the grid, the same input gives the same codes, no argument is changed, a row's codes depend on
its own weights and scale and on the Hessian alone, and on correlated inputs tr((W−Ŵ)H(W−Ŵ)ᵀ) is at most that of
`nearest` (where the technique claims it by NEEDS_HESSIAN and says nothing else). A factor gives the codes of its
Hessian.
"""

from typing import NamedTuple

from torch import Tensor


class Solution(NamedTuple):
    """codes: (rows, cols) int8; facts: what the journal should know (damping, fallbacks)."""

    codes: Tensor
    facts: dict[str, float]
