"""Polar Express (arXiv 2505.16932): a triple for each step of Newton–Schulz, by which singular values come nearer to 1
than by the quintic."""

from collections.abc import Mapping
from typing import Any

from fairway.train.orthogonal import Coefficients

COEFFICIENTS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) trains with them."""
    return any(chosen.get("coefficients") == "polar_express" for chosen in recipe["train"]["optim"].values())
