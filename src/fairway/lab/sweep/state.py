"""What a run is at, read from its folder while it goes on: the journal says the stage, the curve how far it is."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.base import folders
from fairway.base.journal import CURVES, JOURNAL
from fairway.train.schedule import ScheduleSpec, progress

TAIL = 4096  # bytes from the end of a curve: some twenty points
AFTER = {  # the last of these facts in the journal -> what is done after it
    "run": "text",
    "prepare": "train",
    "train": "calibrate",
    "calibration": "quantize",
    "quant": "pack",
    "artifact": "score",
    "proof": "close",
    "done": "done",
}


@dataclass(frozen=True)
class State:
    """stage: what is done now; done: of the training, 0 to 1; seconds_left: of the training, where that goes on."""

    stage: str
    done: float = 0.0
    step: int = 0
    loss: float | None = None
    seconds_left: float | None = None


def state_of(folder: Path, schedule: ScheduleSpec) -> State:
    """What the run in this folder is at."""
    stage = _stage(row.get("fact", "") for row in folders.rows(folder / JOURNAL))
    if stage != "train" or (point := _last_point(folder / CURVES)) is None:
        return State(stage)
    step, seconds = int(point["step"]), float(point["seconds"])
    done = min(progress(schedule, step, seconds), 1.0)
    left = seconds * (1 - done) / done if done else None
    return State(stage, done, step, float(point["loss"]), left)


def _stage(facts: Iterable[str]) -> str:
    stage = "start"
    for fact in facts:
        stage = f"scored {fact.removeprefix('score_')}" if fact.startswith("score_") else AFTER.get(fact, stage)
    return stage


def _last_point(path: Path) -> Mapping[str, Any] | None:
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # cut short at the front, or being written now
            continue
        if isinstance(row, dict) and row.get("curve") == "train":
            return row
    return None
