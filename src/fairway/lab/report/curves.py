"""A training curve of any length, read in one pass and kept in a few hundred points."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POINTS = 300  # at least so many are kept of a curve that has them, at most twice as many
LONGEST = 1 << 16  # bytes of a row: what is longer is no point of a curve


def number(value: Any) -> float | None:
    """A figure as it can be drawn: finite, and no truth value; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond every float
        return None


@dataclass
class Stretch:
    """Neighbouring steps as one point: their sums, and the least and greatest loss among them."""

    first: int
    last: int
    points: int = 0
    steps: float = 0.0
    seconds: float = 0.0
    loss: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    scale: float = 0.0
    norm: float = 0.0
    norms: int = 0  # runs from before norms were kept have none

    def merge(self, other: "Stretch") -> None:
        self.last = other.last
        for name in ("points", "steps", "seconds", "loss", "scale", "norm", "norms"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass
class Curve:
    """What curves.jsonl says of training. `read` takes up what has been written since it was last called, so that a
    run can be watched; a half last line waits for its end, and lines that are no points are passed over."""

    path: Path
    most: int = POINTS
    stretches: list[Stretch] = field(default_factory=list)
    unfit: int = 0  # points whose loss is no finite number
    step: int = 0  # the last one
    seconds: float = 0.0
    _offset: int = 0
    _width: int = 1  # points that make a stretch

    def read(self) -> "Curve":
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                while (line := file.readline(LONGEST)).endswith(b"\n") or len(line) == LONGEST:
                    self._offset += len(line)
                    self._take(line)
        except FileNotFoundError:
            pass
        return self

    def column(self, name: str) -> list[float]:
        """Means over the stretches: steps, seconds, loss, scale; norm only where all have one; low and high as is."""
        if name in ("low", "high"):
            return [float(getattr(part, name)) for part in self.stretches]
        if name == "norm":
            known = all(part.norms for part in self.stretches)
            return [part.norm / part.norms for part in self.stretches] if known else []
        return [float(getattr(part, name)) / part.points for part in self.stretches]

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict) or row.get("curve") != "train":
            return
        step, seconds, loss, scale = (number(row.get(name)) for name in ("step", "seconds", "loss", "scale"))
        if step is None or seconds is None or not 0 <= step < 2**53:
            return
        self.step, self.seconds = int(step), seconds
        if loss is None:
            self.unfit += 1
            return
        norm = number(row.get("norm"))
        point = Stretch(
            int(step), int(step), 1, step, seconds, loss, loss, loss, scale or 0.0, norm or 0.0, int(norm is not None)
        )
        while self.stretches and self.stretches[-1].first >= point.first:  # a resumed run goes over old steps again
            self.stretches.pop()
        if self.stretches and self.stretches[-1].points < self._width:
            self.stretches[-1].merge(point)
            return
        self.stretches.append(point)
        if len(self.stretches) > 2 * self.most:
            for one, other in zip(self.stretches[::2], self.stretches[1::2], strict=False):
                one.merge(other)
            self.stretches, self._width = self.stretches[::2], 2 * self._width


def smoothed(values: list[float], width: int) -> list[float]:
    """Each value as the mean of the `width` values around it; of fewer at both ends, where the window is as wide to the
    left as to the right, so that a trend does not lag behind what it is a trend of."""
    summed = [0.0]
    for value in values:
        summed.append(summed[-1] + value)
    means = []
    for at in range(len(values)):
        arm = min(width // 2, at, len(values) - 1 - at)
        means.append((summed[at + arm + 1] - summed[at - arm]) / (2 * arm + 1))
    return means
