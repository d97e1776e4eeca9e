"""Training, with what is read of training data afterwards, that takes more than 600 s by the logs."""

import re
from functools import partial

from fairway.audit.case import Case
from fairway.audit.passes.charged import passes_of
from fairway.audit.passes.late import LIMIT, beyond, longest, overrun, unclocked
from fairway.audit.passes.reserves import begins_a_time, commanded, lengthened, set_to, under_one_clock
from fairway.audit.passes.restarts import held, learning_loops, restarted
from fairway.audit.records import Amount, Log, record_of
from fairway.audit.terms.clocks import limits, said_at
from fairway.audit.verdict import Finding, Place, Step
from fairway.audit.weighing import FASTEST, steps_after, timed

ID = "training-over-time"
CHARGE = "Training takes longer than 600 s."
CLAUSE = "R2: training <= 600 s"
APART = "timing"
WITHOUT_SCRIPT = True

_NONE = 3 * 24 * 3600.0  # seconds: no limit at all, the steps end it
_CALIBRATION = re.compile(r"calibrat|hessian", re.IGNORECASE)
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|sec|seconds)\b")
_OWN_TEXT = re.compile(r"self[-_ ]?gen|autoregressive|\bAR\b|synthetic|random", re.IGNORECASE)


def check(case: Case) -> Finding:
    found = _by_the_clock(case)
    asked = found.verdict == "clean" and case.tree is not None and not record_of(case.submission).claims.unlimited
    back = restarted(case) if asked else None
    if back is not None:
        evidence = (
            "The clock that ends the training is set back here, or asked here without what it had counted before it "
            "was set back: nothing that ends the training holds that time."
        )
        return Finding(ID, "violates", evidence, CLAUSE, back)
    if not asked:
        return found
    long = timed(case)
    if long is not None and long.more:
        evidence = (
            f"The loop at line {long.loop} takes {long.more} further steps after the clock has ended it at about "
            f"{long.seconds:.0f} s: the {LIMIT - long.seconds:.0f} s that are left do not hold them, at "
            f"{1000 * FASTEST:.0f} ms a step."
        )
        return Finding(ID, "violates", evidence, CLAUSE, case.place(long.line))
    if long is not None:
        evidence = (
            f"Worked out with a clock that goes on with every lesson, read, message and step: the loop at line "
            f"{long.loop} takes {long.seconds:,.0f} s where the script's own arithmetic ends it at its limit."
        )
        return Finding(ID, "violates", evidence, CLAUSE, case.place(long.line))
    which = passes_of(case)[0]
    early = unclocked(case.trace, which)
    late = overrun(case.trace, which, partial(under_one_clock, case), partial(begins_a_time, case))
    step = early or late
    if step is None:
        return _beyond(case) or found
    loop = next((case.trace.loops[loop] for loop, _ in step.nest if loop in case.trace.loops), step.place)
    when = (
        "before the clock of the training is read for the first time" if early else "after the clock ended the training"
    )
    evidence = f"The weights learn at {step.place} {when}, and keep it: these steps are in no 600 s."
    return Finding(ID, "violates", evidence, CLAUSE, loop)


def _beyond(case: Case) -> Finding | None:
    """Steps after the loop that the clock ends, more than the time that it keeps back can hold."""
    found = beyond(case.trace, passes_of(case)[0])
    if found is None:
        return None
    step, limit = found
    loop = next((case.trace.loops[loop] for loop, _ in step.nest if loop in case.trace.loops), step.place)
    own = loop.file == case.body.path
    lines = {loop.line, *(place.line for place in step.stack if place.file == case.body.path)}
    learns = any(each.lineno == loop.line for each in learning_loops(case.body.tree))  # else weights are put in place
    if own and learns and any(held(case.body.tree, line) for line in lines):
        evidence = (
            f"The weights learn at {step.place} while the clock of the training is held: these steps are in no 600 s."
        )
        return Finding(ID, "violates", evidence, CLAUSE, loop)
    after = steps_after(case, loop.line) if own else None
    if after is None:
        return None
    limit = max(limit, after.ended)
    if after.seconds <= LIMIT - limit:
        return None
    evidence = (
        f"At least {after.turns} further steps of the training follow the loop that the clock ends at {limit:.0f} s, "
        f"and ask no clock: the {LIMIT - limit:.0f} s that are left do not hold them, at {1000 * FASTEST:.0f} ms a "
        "step."
    )
    if after.seconds > after.turns * FASTEST:
        evidence = (
            f"The loop that the clock ends at {limit:.0f} s is followed by another one, which goes on for about "
            f"{after.seconds:.0f} s: {LIMIT - limit:.0f} s are left."
        )
    return Finding(ID, "violates", evidence, CLAUSE, loop)


def _by_the_clock(case: Case) -> Finding:
    """The slowest log decides. The step that crosses the line is forgiven: the clock is looked at between steps."""
    record = record_of(case.submission)
    logs = [log for log in record.logs if log.train_seconds is not None]
    if record.claims.unlimited:
        return Finding(ID, "clean", "handed in on a track without the limit of 600 s", CLAUSE)
    if not logs:
        why = "open: the logs print no time of training" if record.logs else "open: no log was handed in"
        return _by_the_script(case) or Finding(ID, "clean", why, CLAUSE)
    worst = max(logs, key=lambda log: sum(step.value for step in _parts(log)))
    parts = _parts(worst)
    seconds = sum(part.value for part in parts)
    forgiven = 2 * (worst.step_ms or 100.0) / 1000 + 0.5
    way = tuple(Step(Place(worst.path, part.line), f"{part.value:.1f} s for {part.says}") for part in parts)
    said = " + ".join(step.what for step in way)
    if seconds > LIMIT + forgiven:
        evidence = f"{worst.path}: {said} make {seconds:.1f} s; the limit is 600 s"
        own = _by_the_script(case)
        return Finding(ID, "violates", evidence, CLAUSE, own.place if own is not None else way[-1].place, way)
    return Finding(ID, "clean", f"at most {seconds:.1f} s ({said}) of 600 s", CLAUSE, way[-1].place, way)


def _by_the_script(case: Case) -> Finding | None:
    """No log times the training: the clock that ends it, with the settings of the run command."""
    if case.tree is None:
        return None
    found = [(seconds, limit) for seconds, limit in limits(case.reading.entry) if seconds > LIMIT * 1.01]
    if not found:
        return _by_the_trace(case)
    seconds, limit = max(found, key=lambda each: each[0])
    if seconds > _NONE:
        return None
    said = said_at(limit, seconds)
    place = commanded(case.settings, str(said.constant())) or lengthened(case, seconds) or case.reading.place(said)
    evidence = f"training goes on until the script's own clock says {seconds:,.0f} s; the limit is 600 s"
    return Finding(ID, "violates", evidence, CLAUSE, place)


def _by_the_trace(case: Case) -> Finding | None:
    """The same of a clock that is asked out of sight of the terms: by a method of an object, whose answer all ranks
    share."""
    found = longest(case.trace, passes_of(case)[0])
    if found is None or not LIMIT * 1.01 < found[1] < _NONE:
        return None
    clock, seconds = found
    given = commanded(case.settings, f"{seconds:g}") or lengthened(case, seconds)
    given = given or set_to(case, clock.place.line, seconds)  # else the clock's own line
    evidence = f"training goes on until the script's own clock says {seconds:,.0f} s; the limit is 600 s"
    return Finding(ID, "violates", evidence, CLAUSE, given or clock.place)


def _own(says: str, trained: float) -> float | None:
    """The seconds that a line gives for the calibration alone: not a sum with training, nor the limit beside it."""
    times = [float(number) * (0.001 if unit == "ms" else 1) for number, unit in _TIME.findall(says)]
    apart = [seconds for seconds in times if seconds < min(trained or LIMIT, LIMIT) * 0.9]
    return min(apart, default=None)


def _parts(log: Log) -> list[Amount]:
    """Training, and the longest calibration on training data that a line after it times."""
    trained = Amount(log.stop_line, f"training ({log.steps} steps)", log.train_seconds or 0.0)
    told = [t for t in log.timers if _CALIBRATION.search(t.says) and not _OWN_TEXT.search(t.says)]
    after = [Amount(t.line, t.says, own) for t in told if (own := _own(t.says, trained.value)) is not None]
    longest = max(after, key=lambda timer: timer.value, default=None)
    return [trained] if longest is None else [trained, Amount(longest.line, f"`{longest.says[:60]}`", longest.value)]
