"""What a run is at, read from its folder while it goes on, and drawn as a frame of text for a terminal.

Only files are read: the run's lock is its own, and a line that is being written waits for its end.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.base.folders import rows
from fairway.base.journal import CURVES, JOURNAL
from fairway.base.lines import short
from fairway.lab.report.curves import Curve, number
from fairway.lab.report.folder import recipe_table
from fairway.lab.submit.export import TRAIN
from fairway.steps.products import ARTIFACT

AFTER = {  # the last of these facts in the journal -> what is done after it
    "run": "preparing the text",
    "prepare": "training",
    "train": "calibrating",
    "calibration": "quantising",
    "quant": "packing",
    "artifact": "scoring",
    "proof": "closing",
    "done": "done",
}
RECENT = 20  # stretches of the curve that the rate is taken from
QUIET = 60.0  # seconds without a new line after which the frame says so


@dataclass(frozen=True)
class View:
    """A run at one moment. done: of the training, 0 to 1; left: seconds of training; spent, limits: training +
    calibration in seconds, code + artifact in bytes (a limit of 0 is none); quiet: seconds since it wrote anything."""

    name: str
    seed: str
    stage: str
    step: int
    total: str
    done: float
    left: float | None
    loss: float | None
    tokens_per_s: float | None
    seconds: float
    seconds_limit: float
    bytes: int | None
    bytes_limit: float
    scores: dict[str, float]
    quiet: float

    @property
    def finished(self) -> bool:
        return self.stage == "done"


class Watch:
    """A run folder that is looked at again and again; of the curve only what is new is read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.curve = folder, Curve(folder / CURVES)

    def look(self) -> View:
        curve, recipe = self.curve.read(), recipe_table(self.folder)
        stage, facts = "not begun", dict[str, dict[str, Any]]()
        for row in rows(self.folder / JOURNAL):
            name = str(row.get("fact"))
            facts[name] = row
            stage = f"scored {name.removeprefix('score_')}" if name.startswith("score_") else AFTER.get(name, stage)
        train = _within(recipe, "train")
        seconds = sum(number(_within(facts, name).get("seconds")) or 0.0 for name in ("train", "calibration"))
        done, total = _done(_within(train, "schedule"), curve, "train" in facts)
        batch = number(train.get("batch_tokens"))
        rate = _rate(curve.stretches[-RECENT:])
        trains = stage == "training" and curve.step > 0
        budget = _within(recipe, "budget")
        return View(
            name=str(recipe.get("name", self.folder.name)),
            seed=str(recipe.get("seed", "?")),
            stage=stage,
            step=curve.step,
            total=total,
            done=done,
            left=curve.seconds * (1 - done) / done if trains and done else None,
            loss=_latest(curve),
            tokens_per_s=rate * batch if rate and batch else None,
            seconds=seconds or curve.seconds,
            seconds_limit=number(budget.get("train_seconds")) or 0.0,
            bytes=_bytes(self.folder),
            bytes_limit=number(budget.get("artifact_bytes")) or 0.0,
            scores=_scores(facts),
            quiet=_quiet(self.folder),
        )


def frame(view: View, curve: Curve, width: int) -> str:
    """The picture of a moment, at most `width` letters wide."""
    head = f"{view.name}, seed {view.seed}: {view.stage}"
    if view.quiet > QUIET and not view.finished:
        head += f" (nothing written for {clock(view.quiet)})"
    losses = curve.column("loss")
    lines = [head, *(plot(curve.column("steps"), losses, min(width - 8, 72), 10) if len(losses) > 1 else [])]
    rate = f"  {short(view.tokens_per_s)} tokens/s" if view.tokens_per_s else ""
    left = f"  {clock(view.left)} left" if view.left is not None else ""
    loss = "" if view.loss is None else f"  loss {view.loss:.4f}"
    if view.step:
        lines.append(f"step      {view.step:,} of {view.total}, {100 * view.done:.0f} %{loss}{rate}{left}")
        lines.append(_budget("seconds", view.seconds, view.seconds_limit, "s"))
    if view.bytes is not None:
        lines.append(_budget("bytes", view.bytes, view.bytes_limit, "bytes"))
    lines += [f"{stage:<9} {value:.4f} bits per byte" for stage, value in view.scores.items()]
    return "\n".join(line[:width] for line in lines)


def line(view: View) -> tuple[str, str, str, str]:
    """The same in one row of a sweep's table: run, stage, how far, score or loss."""
    far = f"{view.step:,} of {view.total}" if view.step and not view.finished else ""
    left = f", {clock(view.left)} left" if view.left is not None else ""
    told = list(view.scores.values())
    value = f"{told[-1]:.4f} bits per byte" if told else "" if view.loss is None else f"loss {view.loss:.3f}"
    return f"{view.name}, seed {view.seed}", view.stage, far + left, value


def plot(across: list[float], values: list[float], width: int, height: int) -> list[str]:
    """A curve in braille dots, 2 by 4 of them in a letter, with the greatest and least value beside it."""
    width = max(width, 10)
    low, high = min(values), max(values)
    reach, span = (high - low) or 1.0, (across[-1] - across[0]) or 1.0
    dots = [[0] * width for _ in range(height)]
    columns: dict[int, list[float]] = {}
    for x, y in zip(across, values, strict=True):
        columns.setdefault(round((x - across[0]) / span * (2 * width - 1)), []).append(y)
    for column, inside in columns.items():
        at = round((high - sum(inside) / len(inside)) / reach * (4 * height - 1))
        dots[at // 4][column // 2] |= _DOTS[at % 4][column % 2]
    rows_ = ["".join(chr(0x2800 + cell) for cell in row) for row in dots]
    labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"]
    return [f"{label:>6} {row}" for label, row in zip(labels, rows_, strict=True)]


def clock(seconds: float) -> str:
    """12 s, 3:05 min, 1:02:30 h"""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02} h" if hours else f"{minutes}:{whole % 60:02} min"


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # the bits of U+2800, row by row


def _budget(name: str, value: float, limit: float, unit: str) -> str:
    if not limit:
        return f"{name:<9} {value:,.0f} {unit}"
    full = min(round(20 * value / limit), 20)
    return f"{name:<9} {'█' * full}{'░' * (20 - full)} {value:,.0f} of {limit:,.0f} {unit}, {100 * value / limit:.1f} %"


def _done(schedule: dict[str, Any], curve: Curve, trained: bool) -> tuple[float, str]:
    """How much of the training is over, and what its end is called."""
    steps, seconds = number(schedule.get("steps")) or 0.0, number(schedule.get("seconds")) or 0.0
    by_clock = schedule.get("by") == "clock" and seconds > 0
    total = f"{seconds:,.0f} s" if by_clock else f"{steps:,.0f} steps" if steps else "?"
    if trained:
        return 1.0, total
    share = curve.step / steps if steps else 0.0
    return min(max(share, curve.seconds / seconds if by_clock else 0.0), 1.0), total


def _rate(recent: list[Any]) -> float | None:
    """Steps a second over the last stretches of the curve."""
    if len(recent) < 2:
        return None
    first, last = recent[0], recent[-1]
    passed = last.seconds / last.points - first.seconds / first.points
    return (last.steps / last.points - first.steps / first.points) / passed if passed > 0 else None


def _latest(curve: Curve) -> float | None:
    """The mean loss of the last stretches."""
    recent = curve.column("loss")[-RECENT:]
    return math.fsum(recent) / len(recent) if recent else None


def _bytes(folder: Path) -> int | None:
    """Artifact and training script, by stat(); None while there is no artifact."""
    try:
        artifact = (folder / ARTIFACT).stat().st_size
    except OSError:
        return None
    script = folder / TRAIN
    return artifact + (script.stat().st_size if script.exists() else 0)


def _scores(facts: dict[str, dict[str, Any]]) -> dict[str, float]:
    found = {name: number(row.get("bits_per_byte")) for name, row in facts.items() if name.startswith("score_")}
    return {name.removeprefix("score_"): value for name, value in found.items() if value is not None}


def _quiet(folder: Path) -> float:
    written = [(folder / name).stat().st_mtime for name in (JOURNAL, CURVES) if (folder / name).exists()]
    return max(time.time() - max(written), 0.0) if written else 0.0


def _within(table: dict[str, Any], key: str) -> dict[str, Any]:
    """A table's table; {} where there is none."""
    inner = table.get(key)
    return inner if isinstance(inner, dict) else {}
