"""When training ends and how the rates fall: by step (reproducible) or by clock (the challenge's).

Constant, then linear to `floor` over the warmdown. By step: scale = (steps − step)/W. By clock, with a mean step of
τ seconds so far: scale = remaining/(W·τ), so that the last W steps fall whatever the machine's speed (#549); or as a
fraction f of the whole: scale = (1 − elapsed/seconds)/f (#1218).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleSpec:
    by: Literal["steps", "clock"] = "steps"
    steps: int = 20000  # the end by step; by clock the most that are taken
    seconds: float = 0.0  # the end by clock, reserve for calibration already taken off
    warmdown: int = 3500  # steps
    warmdown_fraction: float = 0.0  # of steps or seconds; replaces `warmdown` where it is not 0
    floor: float = 0.0  # of the scale, in the warmdown

    def __post_init__(self) -> None:
        if self.by == "clock" and self.seconds <= 0:
            raise ValueError(f"seconds = {self.seconds}: a schedule by clock needs a positive time")
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: at least 1 is needed")
        if not 0 <= self.warmdown_fraction <= 1 or not 0 <= self.floor <= 1:
            raise ValueError("warmdown_fraction and floor lie between 0 and 1")


def done(spec: ScheduleSpec, step: int, elapsed: float) -> bool:
    """Whether training ends before taking `step` (counted from 0), `elapsed` seconds after its start."""
    return step >= spec.steps or (spec.by == "clock" and elapsed >= spec.seconds)


def progress(spec: ScheduleSpec, step: int, elapsed: float) -> float:
    """How much of the run is over, 0 to 1."""
    share = step / spec.steps
    return max(share, elapsed / spec.seconds) if spec.by == "clock" else share


def rate_scale(spec: ScheduleSpec, step: int, elapsed: float) -> float:
    """The factor on every learning rate at a step."""
    if spec.by == "steps":
        left, window = float(spec.steps - step), float(spec.warmdown)
        whole = float(spec.steps)
    else:
        left, whole = max(spec.seconds - elapsed, 0.0), spec.seconds
        window = spec.warmdown * elapsed / max(step, 1)
    if spec.warmdown_fraction:
        window = spec.warmdown_fraction * whole
    if window <= 0 or left >= window:
        return 1.0
    return max(left / window, spec.floor)
