"""Training data that is read for calibration after the training time."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from fairway.audit.flow.events import Choice, Clock, Trace, Update
from fairway.audit.passes.reported import Reported, scores_of


@dataclass(frozen=True)
class Late:
    """Training data read after the training clock: the update or choice, and the clock's limit (None: not known)."""

    update: Update | Choice
    clock: Clock | None


def late_calibration(trace: Trace, reported: Reported, kinds: Container[str] = ("train",)) -> Late | None:
    """What the score's weights were calibrated on, of data of these kinds, after the training time was used up."""
    scores = scores_of(trace, reported.score, reported.data)
    knows = chosen = 0
    for score in scores:
        knows |= score.knows
        chosen |= score.choices
    updates = list(trace.learned(knows))
    trained = [
        update for update in updates if update.how == "gradient" and any(tok.data == "train" for tok in update.learned)
    ]
    last = trained[-1].number if trained else len(trace.events)
    late: list[Update | Choice] = [
        update
        for update in updates
        if update.how == "computed" and update.number > last and any(tok.data in kinds for tok in update.learned)
    ]
    if "train" in kinds:
        late += [choice for choice in trace.chosen(chosen) if _by_training(trace, choice, last)]
    if not late:
        return None
    loops = {loop for update in trained for loop, _ in update.nest}
    clocks = [
        event for event in trace.events if isinstance(event, Clock) and any(loop in loops for loop, _ in event.nest)
    ]
    known = [clock for clock in clocks if clock.limit is not None]
    full = [clock for clock in known if full_cap(clock.limit or 0.0)]
    stops = max(known, key=lambda clock: clock.limit or 0.0) if known else None
    if full:
        return Late(late[0], full[0])
    return None if stops is not None else Late(late[0], None)


def _by_training(trace: Trace, choice: Choice, last: int) -> bool:
    """Whether a choice was made by losses on training text alone that were computed after event `last`: a fit of its
    own. By the losses of the training steps themselves it reads nothing anew."""
    scores = list(trace.scored(choice.losses))
    kinds = {tok.data for score in scores for tok in score.targets}
    return choice.number > last and kinds == {"train"} and any(score.number > last for score in scores)


def full_cap(limit: float) -> bool:
    """Whether a limit is the whole 600 s, in seconds or milliseconds."""
    return 599.0 <= limit <= 700.0 or 599_000.0 <= limit <= 700_000.0


__all__ = ["Late", "late_calibration"]
