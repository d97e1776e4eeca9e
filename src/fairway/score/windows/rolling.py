"""Rolling windows: every token is read once, and sees the keys and values of the T - 1 tokens before it.

Each layer's keys and values are computed once and kept; attention is limited to the training context T, so that a
deeper layer's keys carry what lies farther back. A sliding window must be read anew for every S targets, since its
deeper keys depend on where it begins; this one costs a forward for each token, batch or step by step, and decodes in
many lanes at once. A model trained only from position 0 may lean on its first tokens, which are lost here after T.
"""

from dataclasses import dataclass

import numpy as np

from fairway.score.stream import Windows

CARRIED = True


@dataclass(frozen=True)
class Spec:
    """Nothing to choose: attention reaches as far back as the context of the score."""


def windows(targets: int, context: int, spec: Spec) -> Windows:
    """Steps [0, T), [T, 2T), ... of a lane, each read after what the one before left; the last may be short."""
    start = np.arange(0, targets, context, dtype=np.int64)
    return Windows(start, np.minimum(start + context, targets), start)
