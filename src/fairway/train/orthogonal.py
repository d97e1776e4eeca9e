"""Newton–Schulz: the nearest semi-orthogonal matrix by matrix products alone. What Muon's techniques share.

X = u/‖u‖_F, wide side last; five times X ← aX + (bA + cA²)X with A = XXᵀ; the quintic pushes singular values into about
[0.7, 1.2]. It sees whole matrices or it is another method: slices of rows are made orthogonal each by itself.
"""

from collections.abc import Iterable

from torch import Tensor

from fairway.base import slots

Coefficients = tuple[float, float, float]
QUINTIC: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5


def newton_schulz(u: Tensor, coefficients: Iterable[Coefficients] = QUINTIC) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values of u are pushed towards 1.

    u: (..., rows, columns), any scale -> the same shape and dtype.
    """
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def rising(start: float, end: float, warmup: int, step: int) -> float:
    """The momentum of a step, counted from 0: linear from `start`, `end` after `warmup` steps."""
    return start + (min(step / warmup, 1.0) if warmup else 1.0) * (end - start)


def coefficients_of(name: str) -> Iterable[Coefficients]:
    """Those of the quintic or of polar_express."""
    if name == "quintic":
        return QUINTIC
    triples: tuple[Coefficients, ...] = slots.optional("fairway.train.polar_express").COEFFICIENTS
    return triples
