"""Sliding windows: every target but the first T is scored with at least T - S tokens of context.

Windows start at 0, S, 2S, ...; the first scores all its T targets, every other only its last S. The window set is
"w + T - S < N": the older "w < N" adds short tail windows that score the last targets a second time (31 windows and
1,984 targets at T = 2048, S = 64). Gain over plain windows: 0.032 bits per byte at T = 1024 (record of 2026-03-19).
"""

from dataclasses import dataclass

import numpy as np

from fairway.score.stream import Windows

CARRIED = False


@dataclass(frozen=True)
class Spec:
    """stride: S, the targets that a window scores."""

    stride: int = 64  # tokens

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride = {self.stride}: at least 1 token is expected")


def windows(targets: int, context: int, spec: Spec) -> Windows:
    """Sliding windows of T = `context` tokens over `targets` targets; the last may be short."""
    if spec.stride > context:
        raise ValueError(f"stride = {spec.stride} is larger than the context of {context} tokens: choose at most that")
    later = np.arange(spec.stride, max(targets - context + spec.stride, spec.stride), spec.stride, dtype=np.int64)
    start = np.concatenate([np.zeros(1, np.int64), later])
    first = np.concatenate([np.zeros(1, np.int64), later + context - spec.stride])
    return Windows(start, np.minimum(start + context, targets), first)
