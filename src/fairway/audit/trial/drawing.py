"""Orders and single numbers that are drawn by chance: any will do, as long as each thing is in an order once."""

from __future__ import annotations

import ast
import re

import numpy as np

from fairway.audit.trial.arrays import Array, limited, scalar
from fairway.audit.trial.values import UNKNOWN, Value

_FILLING = re.compile(r"(trunc_|kaiming_|xavier_|log_)?(normal|uniform)_|orthogonal_|sparse_")


def drawn(call: ast.expr) -> ast.expr | None:
    """The tensor that a statement fills with noise: `w` of `nn.init.orthogonal_(w)` and of `w.normal_(0, 0.02)`."""
    if not isinstance(call, ast.Call):
        return None
    func = call.func
    name = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    if not _FILLING.fullmatch(name):
        return None
    owner = func.value if isinstance(func, ast.Attribute) else None
    if owner is not None and ast.unparse(owner).split(".")[-1] != "init":
        return owner if isinstance(owner, _PLACES) else None
    return call.args[0] if call.args and isinstance(call.args[0], _PLACES) else None


_PLACES = (ast.Name, ast.Attribute, ast.Subscript)


class Draws:
    """np.random.default_rng(seed), np.random.RandomState(seed): its orders, and whole numbers one at a time. Of its
    fractions, and of many numbers at once, nobody knows."""

    def __init__(self, *_: Value, **__: Value) -> None:
        self.generator = np.random.default_rng(5)

    def permutation(self, things: Value, *_: Value, **__: Value) -> Value:
        """Of range(n), or of the rows of an array."""
        if isinstance(things, Array):
            order = self.generator.permutation(len(things))
            return things.all(lambda body: body[order])
        many = scalar(things)
        if isinstance(many, list):
            return Array(np.asarray(many)[self.generator.permutation(len(many))])
        if not isinstance(many, (int, np.integer)):
            return UNKNOWN
        limited(float(many))
        return Array(self.generator.permutation(int(many)))

    permuted = permutation

    def integers(self, low: Value, high: Value = None, size: Value = None, *_: Value, **kwargs: Value) -> Value:
        """One of low .. high - 1, of 0 .. low - 1 where there is no high, as loaders draw where a window begins."""
        least, end = (0, scalar(low)) if high is None else (scalar(low), scalar(high))
        if size is not None or kwargs.get("endpoint") or type(least) is not int or type(end) is not int:
            return UNKNOWN
        return int(self.generator.integers(least, end))

    randint = integers

    def choice(self, things: Value, size: Value = None, *_: Value, p: Value = None, **__: Value) -> Value:
        """One of range(things): of those that have a chance."""
        many = scalar(things)
        if size is not None or type(many) is not int:
            return UNKNOWN
        chances = p.num if isinstance(p, Array) else None
        if chances is None or chances.shape != (many,) or not np.nansum(chances) > 0:
            return int(self.generator.integers(many))
        return int(self.generator.choice(np.flatnonzero(chances > 0)))

    def shuffle(self, things: Value, *_: Value, **__: Value) -> None:
        """In place."""
        if isinstance(things, list):
            things[:] = [things[n] for n in self.generator.permutation(len(things)).tolist()]
        elif isinstance(things, Array):
            order = self.generator.permutation(len(things))
            for body in (things.num, things.pos, things.coef):
                if body is not None:
                    body[:] = body[order]


__all__ = ["Draws"]
