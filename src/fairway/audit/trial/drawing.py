"""Orders that are drawn by chance: any will do, as long as each thing is in it once."""

from __future__ import annotations

import numpy as np

from fairway.audit.trial.arrays import Array, limited, scalar
from fairway.audit.trial.values import UNKNOWN, Value


class Draws:
    """np.random.default_rng(seed), np.random.RandomState(seed): its orders. Of its numbers nobody knows."""

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
