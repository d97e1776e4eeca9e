"""Honest losses, dishonestly added up: tails that count twice, and bytes that nobody wrote."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fairway.score.diagnose.scene import Procedure, windows_of
from fairway.score.predictor import Block
from fairway.score.stream import Unit, Windows


def old_windows(targets: int, context: int, stride: int) -> Windows:
    """The window set "w < N" (#50 and heirs): T / S − 1 short tail windows score the last S targets again."""
    start = np.arange(0, targets, stride, dtype=np.int64)
    stop = np.minimum(start + context, targets)
    return windows_of(start, stop, np.where(start == 0, 0, np.maximum(stop - stride, start)))


class DuplicatedTails(Procedure):
    """The early sliding window."""

    name = "duplicated_tails"
    charge = "short tail windows score the last targets again and again, and the mean is taken over all of it"

    def charges(self, unit: Unit) -> Iterator[Block]:
        targets, windows = self.stream.targets, unit.windows
        last = windows.stop == targets
        if last.any():
            old = old_windows(targets, self.scene.context, self.scene.windows.stride)
            windows = _joined(windows[~last], old[old.stop == targets])
        yield from self.read(self.inner, replace(unit, windows=windows))


class InflatedBytes(Procedure):
    """#1545 and five more; #1143, #1184: the byte table as two bugs had it."""

    name = "inflated_bytes"
    charge = "the bytes are a table's: a leading space counts twice, and a byte piece as the three of U+FFFD"

    def byte_lengths(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        tokenizer, ids = self.scene.tokenizer, np.asarray(tokens[1:], dtype=np.int64)
        extra = [len(piece.decode("utf-8", "replace").encode()) - len(piece) for piece in tokenizer.pieces]
        spaces = tokenizer.lead[ids] & ~tokenizer.boundary[np.asarray(tokens[:-1], dtype=np.int64)]
        found: npt.NDArray[np.int64] = super().byte_lengths(tokens) + spaces + np.array(extra, np.int64)[ids]
        return found


def _joined(a: Windows, b: Windows) -> Windows:
    start, stop, first = (np.concatenate([getattr(a, k), getattr(b, k)]) for k in ("start", "stop", "first"))
    return windows_of(start, stop, first)
