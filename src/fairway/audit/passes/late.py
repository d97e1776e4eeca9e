"""Training text that is read when the time for it is over: after the training clock, or while the score is made."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from fairway.audit.flow.events import Call, Choice, Clock, Event, Score, Trace, Update
from fairway.audit.flow.known import CLOCKS
from fairway.audit.passes.reported import Reported, scores_of

LIMIT = 600.0  # seconds of training
_MILLI = 6_000.0  # what is more is told in thousandths


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
    known = [clock for clock in _ending(trace, trained) if clock.limit is not None]
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


def unclocked(trace: Trace, reported: Reported) -> Update | None:
    """A step of the training that the score's weights still know, before the clock that ends the training was read for
    the first time: a warm-up whose weights are kept."""
    trained = _trained(trace, reported)
    end = next(iter(_ending(trace, trained)), None)
    if end is None:
        return None
    around = {loop for loop, _ in end.nest}
    begun = [
        each.number
        for each in trace.events[: end.number]
        if isinstance(each, Call) and each.name in CLOCKS and each.place != end.place
        if not around & {loop for loop, _ in each.nest}
    ]
    early = next((update for update in trained if begun and update.number < begun[-1]), None)
    between = trace.events[early.number : begun[-1]] if early is not None else ()
    put_back = any(isinstance(each, Call) and each.name == "load_state_dict" for each in between)  # with what, or not
    return None if put_back else early


def overrun(
    trace: Trace,
    reported: Reported,
    together: Callable[[Event, Event], bool] = lambda step, clock: False,
    begins: Callable[[Event], bool] = lambda read: False,
) -> Update | None:
    """A step of the training that the score's weights still know, after the loop that the clock ends: with no clock in
    a loop of its own, and, where some of the time was kept back, after the clock was read for the last time before a
    file is written or a text scored; between these two a look counts that begins no other time. together(step, clock):
    whether one clock runs over both of them; begins(read): whether a time begins there, `t0 = time()`, of which the
    step is a part."""
    trained = _trained(trace, reported)
    ends = [each for each in _ending(trace, trained) if each.limit is not None]
    if not ends:
        return None
    timed = _timed(trace)
    end = ends[-1].number
    late = (each for each in trained if each.number > end and not timed & {loop for loop, _ in each.nest})
    after = next(late, None)
    if after is None or any(full_cap(each.limit or 0.0) for each in ends):
        return after
    calls = [
        each
        for each in trace.events[end:]
        if isinstance(each, Call) and each.name in CLOCKS and not timed & {loop for loop, _ in each.nest}
    ]
    last = next((each for each in reversed(calls) if each.number < after.number), None)
    if last is not None and begins(last):
        return None
    over = next((n for n in trace.saved if n > after.number), len(trace.events))
    scores = (each for each in trace.events[after.number :] if isinstance(each, Score))
    scored = next((each.number for each in scores if any(tok.data in reported.data for tok in each.targets)), over)
    looks = (each for each in calls if after.number < each.number < scored)
    held = any(each.number < over or not begins(each) for each in looks)
    read = any(each.number < after.number for each in calls) and not held
    return after if read and not together(after, ends[-1]) else None


def beyond(trace: Trace, reported: Reported) -> tuple[Update, float] | None:
    """A step of the training, on the same weights, after the first loop that a clock ends at less than 600 s, in a loop
    of its own: with it the limit in seconds."""
    trained = _trained(trace, reported)
    ends = [each for each in _ending(trace, trained) if each.limit]
    if not ends:
        return None
    own = {loop for loop, _ in ends[0].nest}
    ends = [each for each in ends if own & {loop for loop, _ in each.nest}]
    limit = max(_seconds(each) for each in ends)
    before = {update.state for update in trained if own & {loop for loop, _ in update.nest}}
    late = (each for each in trained if each.number > ends[-1].number and each.nest and each.state in before)
    after = next((each for each in late if not own & {loop for loop, _ in each.nest}), None)
    return None if after is None or not 0.0 < limit < LIMIT else (after, limit)


def longest(trace: Trace, reported: Reported) -> tuple[Clock, float] | None:
    """Of the clocks that end a loop in which the score's weights learned, the one with the largest limit, and that
    limit in seconds; None where no limit is known."""
    ends = [each for each in _ending(trace, _trained(trace, reported)) if each.limit]
    last = max(ends, key=_seconds, default=None)
    return None if last is None else (last, _seconds(last))


def _ending(trace: Trace, trained: list[Update]) -> list[Clock]:
    """The clocks that are asked in a turn of a loop in which these steps were made, in order: a loop over the phases of
    a run trains in one of its turns."""
    turns = {turn for update in trained for turn in update.nest}
    return [each for each in trace.events if isinstance(each, Clock) and not turns.isdisjoint(each.nest)]


def _timed(trace: Trace) -> set[int]:
    """The loops that ask a clock."""
    return {loop for event in trace.events if isinstance(event, Clock) for loop, _ in event.nest}


def _seconds(clock: Clock) -> float:
    """A clock's limit in seconds, which may be told in milliseconds; 0 where none is known."""
    limit = clock.limit or 0.0
    return limit / 1000.0 if limit > _MILLI else limit


def _trained(trace: Trace, reported: Reported) -> list[Update]:
    """The steps on training text that what scores still knows."""
    knows = 0
    for score in scores_of(trace, reported.score, reported.data):
        knows |= score.knows
    return [
        update
        for update in trace.learned(knows)
        if update.how == "gradient"
        and {tok.data for tok in update.learned} - {"random"} == {"train"}  # a warm-up before
    ]


def over_long(limit: float) -> bool:
    """Whether a limit, in seconds or milliseconds, is more than the 600 s themselves: training-over-time says so."""
    return limit > 606.0 and not 6_000.0 <= limit <= 606_000.0


def taught_at_evaluation(trace: Trace, reported: Reported) -> Update | None:
    """What the score learned from training text that was read after the last file of weights had been written: by
    steps or counts that are none of the training's own (which a checkpoint in its loop may precede), and that no clock
    holds. What was read before may lie in that file, and is paid for."""
    for score in scores_of(trace, reported.score, reported.data):
        written = max((number for number in trace.saved if number <= score.number), default=0)
        before = {(each.place, each.stack) for each in trace.updates if each.number < written}
        for update in trace.learned(score.knows) if before else ():
            new = update.number >= written and (update.place, update.stack) not in before
            new = new and update.how in ("gradient", "table") and {tok.data for tok in update.learned} == {"train"}
            if new and _read_after(trace, update, written) and not _clocked(trace, update):
                return update
    return None


def _read_after(trace: Trace, update: Update, written: int) -> bool:
    """Whether some of what was learned was first read after an event."""
    return any(tok.origin >= 0 and trace.reads[tok.origin].after >= written for tok in update.learned)


def _clocked(trace: Trace, update: Update) -> bool:
    """Whether a loop that an update stands in asks the clock."""
    return bool(_timed(trace) & {loop for loop, _ in update.nest})
