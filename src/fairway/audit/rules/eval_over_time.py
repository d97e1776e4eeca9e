"""Evaluation that takes more than 600 s, as the logs measure it, with work that was done outside the timer, as the
script's own clock allows it or as the README says."""

import re

from fairway.audit.case import Case
from fairway.audit.exemptions import departure
from fairway.audit.records import Amount, Log, Score, evaluation_times, record_of, untimed
from fairway.audit.terms.clocks import evaluation_limits, said_at
from fairway.audit.verdict import Finding, Place, Step

ID = "eval-over-time"
CHARGE = "Evaluation takes longer than 600 s."
CLAUSE = "R3: evaluation <= 600 s"
WITHOUT_SCRIPT = True

LIMIT = 600.0  # seconds
_NEXT = 3  # lines between a score and the time that was taken for it
_SUM = re.compile(r"total[_ ]?eval[_ a-z]*time|eval(?:uation)?[_ ]?total", re.IGNORECASE)
_ALL = re.compile(r"^(?:\[[^\]]*\] *)?(?:the |whole |total )*evaluation (?:took|time|lasted)\b", re.IGNORECASE)
_OUTSIDE = re.compile(
    r"precomput|n-?gram|hint|tilt|cache|index|ppm|mixer|prepar|suffix|adapt|ttt|lora|hash", re.IGNORECASE
)
_BEFORE = re.compile(
    r"gptq|quant|serializ|compress|hessian|calibrat|warm-?up|compile|prune|artifact|export", re.IGNORECASE
)

# More than that; not of how many chunks something learned.
_WHOLE = re.compile(
    r"(?<!chunks.)(?<!docs.)(?<!documents.)train|process|whole|entire|script|since (?:the )?start", re.IGNORECASE
)


def check(case: Case) -> Finding:
    """The slowest log decides; of several over the limit the first is named."""
    logs = [log for log in record_of(case.submission).logs if log.scores or _told(log) is not None]
    timed = [(spent, log) for log in logs if (spent := _spent(log)) is not None]
    if not timed:
        why = "open: the logs print no time of evaluation" if logs else "open: no log was handed in"
        return _by_the_script(case) or _by_the_readme(case) or Finding(ID, "clean", why, CLAUSE)
    slowest = max(timed, key=lambda each: each[0][0])
    over = [each for each in timed if each[0][0] > LIMIT]
    (seconds, place, way), log = over[0] if over else slowest
    said = " + ".join(step.what for step in way)
    if seconds > LIMIT:
        clock = _by_the_script(case)  # what lets it go on for so long, where the script says so
        place = clock.place or place if clock is not None else place
        return Finding(
            ID,
            "violates",
            f"{log.path}: evaluation took {seconds:.1f} s ({said}); the limit is 600 s"
            + (f" ({len(over)} logs are over it, by up to {slowest[0][0] - LIMIT:.1f} s)" if len(over) > 1 else ""),
            CLAUSE,
            place,
            way,
        )
    for (own, at, steps), each in timed:
        rest = _others(each)
        if rest:
            evidence = f"{each.path}: {own:.1f} s ({' + '.join(step.what for step in steps)}) of 600 s{rest}."
            return departure(case, "diagnostics-beside-the-clock", CLAUSE, evidence, at, steps)
    return Finding(ID, "clean", f"at most {seconds:.1f} s ({said}) of 600 s", CLAUSE, place, way)


def _by_the_script(case: Case) -> Finding | None:
    """No log times the evaluation: the clock that would stop it, with the settings of the run command. A clock that
    allows half an hour and more watches for a hang."""
    if case.tree is None:
        return None
    found = [(s, limit) for s, limit in evaluation_limits(case.reading.entry) if LIMIT * 1.01 < s < 3 * LIMIT]
    if not found:
        return None
    seconds, limit = max(found, key=lambda each: each[0])
    place = case.reading.place(said_at(limit, seconds))
    evidence = f"evaluation may go on until the script's own clock says {seconds:,.0f} s; the limit is 600 s"
    return Finding(ID, "violates", evidence, CLAUSE, place)


def _by_the_readme(case: Case) -> Finding | None:
    """No log and no clock says anything: the longest evaluation that the author gives, with what is said to be done
    outside its clock, forgiven what rounding makes."""
    told = evaluation_times(case.submission.readme)
    if record_of(case.submission).claims.unlimited or not told:
        return None
    longest = max(told, key=lambda each: each.value)
    outside = untimed(case.submission.readme)
    if longest.value + sum(each.value for each in outside) <= LIMIT * 1.01:
        return None
    evidence = (
        f"The README says that evaluation takes {longest.value:,.0f} s (`{longest.says[:90]}`)"
        + "".join(f", and {each.value:,.0f} s outside its clock (`{each.says[:90]}`)" for each in outside)
        + "; the limit is 600 s"
    )
    longest = longest if longest.value > LIMIT * 1.01 else outside[0]
    name = next((each for each in case.submission.sizes if each.lower().startswith("readme")), "README.md")
    return Finding(ID, "violates", evidence, CLAUSE, Place(name, longest.line))


def _spent(log: Log) -> tuple[float, Place, tuple[Step, ...]] | None:
    """(seconds, place, parts) of the score that is reported: its own timer and work for it outside that timer."""
    final = _timed(log)
    sums = [timer for timer in log.timers if _SUM.search(timer.says)]
    if sums:
        return sums[-1].value, Place(log.path, sums[-1].line), (_step(log, sums[-1]),)
    if final is None or final.seconds is None:
        return _beside(log) or _told(log)
    outside = [timer for timer in log.timers if timer.line < final.line and _is_outside(timer, final)]
    parts = [_step(log, timer) for timer in outside]
    own = Step(Place(log.path, final.line), f"{final.seconds:.1f} s for {final.stage or 'the score'}"[:90])
    place = own.place if not outside else Place(log.path, outside[0].line)
    return final.seconds + sum(timer.value for timer in outside), place, (own, *parts)


def _timed(log: Log) -> Score | None:
    """The last score with a time: an exact line repeats the score without one."""
    final = log.final
    same = [
        s for s in log.scores if s.seconds is not None and final and abs(s.bits_per_byte - final.bits_per_byte) < 6e-4
    ]
    return same[-1] if same else None


def _beside(log: Log) -> tuple[float, Place, tuple[Step, ...]] | None:
    """Where no score has a time on its own line: the longest of those printed next to the score that is reported."""
    final = log.final
    near = [t for t in log.timers if final is not None and -_NEXT <= t.line - final.line <= _NEXT]
    own = [t for t in near if not _BEFORE.search(t.says) and not _WHOLE.search(t.says)]
    if final is None or final.step is not None or not own:
        return None
    longest = max(own, key=lambda timer: timer.value)
    return longest.value, Place(log.path, longest.line), (_step(log, longest),)


def _told(log: Log) -> tuple[float, Place, tuple[Step, ...]] | None:
    """The last time that is said to be the evaluation's, where no score stands beside it."""
    told = [timer for timer in log.timers if _ALL.search(timer.says)]
    return (told[-1].value, Place(log.path, told[-1].line), (_step(log, told[-1]),)) if told else None


def _is_outside(timer: Amount, final: Score) -> bool:
    """Work for the evaluation that the final timer does not hold: a precomputation with a time of its own."""
    own = final.seconds or 0.0
    progress = re.search(
        r"chunk|batch|doc|phase|\d+/\d+|step|epoch|elapsed|\b(?:rb|rd|tl)\b", timer.says, re.IGNORECASE
    )
    apart = _OUTSIDE.search(timer.says) and not _BEFORE.search(timer.says) and not progress
    return bool(apart) and abs(timer.value - own) > 0.02 * own  # the same time printed twice is one time


def _step(log: Log, timer: Amount) -> Step:
    return Step(Place(log.path, timer.line), f"{timer.value:.1f} s for `{timer.says[:60]}`")


def _others(log: Log) -> str:
    """What else was evaluated: whether it counts is unsettled."""
    final = _timed(log)
    rest = sum(s.seconds or 0.0 for s in log.scores if s.step is None and s is not final)
    if final is None or final.seconds is None or final.seconds + rest <= LIMIT:
        return ""
    return f"; with {rest:.1f} s of other evaluations it would be over, and whether those count is unsettled"
