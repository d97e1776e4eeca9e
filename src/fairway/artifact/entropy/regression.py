"""A code from the codes before it in its row, by the covariance of the columns in the tensor's earlier rows.

With the covariance C = L D Lᵀ (L unit lower triangular), x = L e has uncorrelated e: column j is expected at
Σ_{k<j} L_jk e_k, and what is left has variance D_j. C is estimated as Σ x xᵀ + ridge · (mean square) · I, and factored
in fixed point: 16 digits behind the point, sums of products far below 2^63. Tables of hashed pairs and of values won
1 and 2 % by it; matrices that Muon trained won nothing, for their columns are uncorrelated. A group says whether it is
used.
"""

import numpy as np
from numpy.typing import NDArray

from fairway.artifact.entropy.tables import Ints, log2
from fairway.artifact.groups import Codes

FINE = 16  # parts of a code in which predictions are counted
POINT = 16  # binary digits behind the point of L
TOP = 30  # binary digits of the largest variance


def factored(covariance: Ints) -> tuple[Ints, Ints]:
    """covariance: (n, n) positive definite, up to 2^62 -> L below its diagonal (n, n), 16 digits behind the point, and
    (n,) 64 · log2 C_jj / D_j, what the variance of each column loses."""
    size = len(covariance)
    largest = int(covariance.diagonal().max())
    down = largest.bit_length() - TOP
    rest = covariance >> down if down > 0 else covariance << -down
    lower, variances = np.zeros_like(rest), np.maximum(rest.diagonal(), 1)
    pivots = np.empty(size, dtype=np.int64)
    for k in range(size):
        pivots[k] = max(int(rest[k, k]), 1)
        line = rest[k, k + 1 :].copy()
        factor = (line << POINT) // pivots[k]
        lower[k + 1 :, k] = factor
        rest[k + 1 :, k + 1 :] -= (factor[:, None] * line) >> POINT
    return lower, log2(variances) - log2(pivots)


class Regression:
    """Of one tensor. ridge: in rows of the mean square; prior: the mean square in sixteenths."""

    def __init__(self, cols: int, ridge: int, prior: int) -> None:
        self.products = np.eye(cols, dtype=np.int64) * max(1, ridge * prior // 16)
        self.lower, self.gains = factored(self.products)

    def add(self, codes: Codes) -> None:
        """codes: (rows, cols)."""
        wide = codes.astype(np.int64)
        self.products += wide.T @ wide
        self.lower, self.gains = factored(self.products)

    def expected(self, column: int, residuals: Ints) -> Ints:
        """(lanes,) in sixteenths. residuals: (cols, lanes) in sixteenths, known before `column`."""
        return (self.lower[column, :column] @ residuals[:column]) >> POINT


def worth(codes: Codes) -> float:
    """The bits a code that regression may save, estimated: fitted on one half of the rows, tried on the other."""
    rows, cols = codes.shape
    if rows < 64 or not 8 <= cols <= 1024:
        return 0.0
    wide: NDArray[np.float64] = codes.astype(np.float64)
    half, other = wide[::2], wide[1::2]
    ridge = 256 * float((wide**2).mean()) + 1e-3
    covariance = half.T @ half + ridge * np.eye(cols)
    root = np.linalg.cholesky(covariance)
    left = np.linalg.solve(root / root.diagonal(), other.T).T
    scale = root.diagonal() ** 2 / (len(half) + 256)
    plain = (covariance.diagonal()) / (len(half) + 256)
    cost = (left**2 / scale + np.log(scale)).mean()
    return float(((other**2 / plain + np.log(plain)).mean() - cost) / (2 * np.log(2)))
