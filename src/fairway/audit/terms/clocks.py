"""Clocks: what a script compares with the time that has gone by, and in which unit."""

from collections.abc import Iterator

from fairway.audit.terms.data import is_validation
from fairway.audit.terms.program import Program
from fairway.audit.terms.streams import Streams, token_terms
from fairway.audit.terms.term import Term, alternatives, peel, walk
from fairway.audit.terms.things import Event

_TAKING = ("backward", "grad")  # what takes a loss back
_CLOCKS = {"time": 1.0, "perf_counter": 1.0, "monotonic": 1.0, "perf_counter_ns": 1e9, "monotonic_ns": 1e9}


def elapsed(term: Term, depth: int = 10) -> tuple[float, bool] | None:
    """(units for a second, whether it is counted from one start) of a time that has gone by; None for anything else.

    1000 * (now - t0) has a thousand for a second; where t0 is set anew in each round, the time is that of an interval.
    """
    term = peel(term)
    if not depth:
        return None
    if term.op == "op" and term.value == "-":
        now, start = peel(term.parts[0]), peel(term.parts[1])
        reading = next((one for one in (now, *_summed(now)) if one.op == "call" and one.called in _CLOCKS), None)
        if reading is not None:
            return _CLOCKS[reading.called], start.op not in ("merge", "choice") or reading is not now
        return elapsed(now, depth - 1)
    if term.op == "op" and term.value in ("*", "/"):
        for part, other in (term.parts, term.parts[::-1]):
            number, found = other.constant(), elapsed(part, depth - 1)
            if found is not None and isinstance(number, (int, float)) and number:
                return (found[0] * number if term.value == "*" else found[0] / number), found[1]
        return None
    if term.op == "op" and term.value == "+":  # what has been counted so far, and what has gone by since
        found = next((one for part in term.parts if (one := elapsed(part, depth - 1)) is not None), None)
        return None if found is None else (found[0], True)
    if term.op in ("merge", "choice"):
        parts = term.parts[1:] if term.op == "choice" else term.parts
        return next((one for part in parts if (one := elapsed(part, depth - 1)) is not None), None)
    return None


def _summed(term: Term) -> list[Term]:
    """spent and time() of spent + time()."""
    return [peel(part) for part in term.parts] if term.op == "op" and term.value == "+" else []


def limits(program: Program) -> Iterator[tuple[float, Term]]:
    """(seconds, the limit) of every clock that training on other than validation tokens is held against, in a loop: a
    check after it ends nothing."""
    last = {(event.term.file, event.term.line): event for event in program.machine.clocks}
    streams = Streams()
    for event in (each for each in last.values() if each.loops):
        for seconds, whole, _, limit in _held(event.term):
            if whole and _trains(program, event, streams):
                yield seconds, limit


def evaluation_limits(program: Program) -> Iterator[tuple[float, Term]]:
    """(seconds, the limit) of every clock that was started after the training that a clock ends."""
    streams = Streams()
    readings = {id(event.term): event.order for event in program.called(*_CLOCKS)}
    ended = [clock for clock in program.machine.clocks if clock.loops]
    learnt = [event for event in program.called(*_TAKING) if _of_training(event, streams)]
    trained = max((each.order for each in learnt if any(_within(each, clock) for clock in ended)), default=-1)
    last = {(event.term.file, event.term.line): event for event in program.machine.clocks}
    for event in last.values() if trained >= 0 else ():
        for seconds, whole, since, limit in (*_held(event.term), *_less_what_is_left(event.term)):
            started = min((readings.get(id(one), 0) for one in walk(since) if one.called in _CLOCKS), default=0)
            if whole and started > trained:
                yield seconds, limit


def _held(test: Term) -> Iterator[tuple[float, bool, Term, Term]]:
    """(seconds, whether from one start, where that is read, the limit) of what a comparison holds a time against: an
    interval against a number, or the clock against its start and numbers, `time() < begun + 600`."""
    for side, other in (test.parts[:2], test.parts[1::-1]):
        found, number = elapsed(side), _number(other)
        if found is not None and number is not None:
            yield number.value / found[0], found[1], side, number
        now, parts = peel(side), list(_added(peel(other)))
        begun = [one for one, sign in parts if one.called in _CLOCKS and sign > 0]
        rest = [(_number(one), sign) for one, sign in parts if one.called not in _CLOCKS]
        if now.called not in _CLOCKS or len(begun) != 1 or len(begun) + len(rest) != len(parts) or not rest:
            continue
        if all(number is not None for number, _ in rest):
            total = sum(sign * number.value for number, sign in rest if number is not None)
            yield total / _CLOCKS[now.called], True, begun[0], other


def _less_what_is_left(test: Term) -> Iterator[tuple[float, bool, Term, Term]]:
    """The same of a number less something for each batch that is left, `cap - 0.15 * (len(batches) - i)`: at the end it
    is the number."""
    for side, other in (test.parts[:2], test.parts[1::-1]):
        found, limit = elapsed(side), peel(other)
        if found is None or limit.op != "op" or limit.value != "-":
            continue
        number, rest = _number(limit.parts[0]), peel(limit.parts[1])
        each = rest.op == "op" and rest.value == "*" and any(peel(part).value == "-" for part in rest.parts)
        if number is not None and each:
            yield number.value / found[0], found[1], side, number


def _added(term: Term, sign: int = 1) -> Iterator[tuple[Term, int]]:
    """The terms of a sum, each with its sign."""
    if term.op == "op" and term.value in ("+", "-") and len(term.parts) == 2:
        yield from _added(peel(term.parts[0]), sign)
        yield from _added(peel(term.parts[1]), sign if term.value == "+" else -sign)
    else:
        yield term, sign


def _number(term: Term) -> Term | None:
    """The one number that a value is, whichever way it was reached."""
    options = alternatives(term, 8)
    numbers = [one for one in options if one.op == "const" and type(one.value) in (int, float)]
    return numbers[0] if len(numbers) == len(options) and len({one.value for one in numbers}) == 1 else None


def _trains(program: Program, clock: Event, streams: Streams) -> bool:
    """Whether losses of other than validation tokens are taken back where this clock is looked at."""
    return any(_within(event, clock) and _of_training(event, streams) for event in program.called(*_TAKING))


def _within(event: Event, clock: Event) -> bool:
    return event.path[: len(clock.path)] == clock.path


def _of_training(event: Event, streams: Streams) -> bool:
    """Whether a loss of other than validation tokens is taken back here, again and again."""
    term = event.term
    loss = term.receiver if term.called == "backward" else term.argument(0, "outputs") if _by_name(term) else None
    if loss is None or not event.loops:
        return False
    return not any(is_validation(token, streams) for token in token_terms(loss, streams, 1500))


def _by_name(term: Term) -> bool:
    """torch.autograd.grad(loss, weights)"""
    return str(term.value).endswith("autograd.grad")


def said_at(limit: Term, seconds: float) -> Term:
    """Where a limit was set: the setting that the run command gave it, else the number that it was worked out from
    (690 of 1000 * (690 - reserve)), else the limit itself."""
    numbers: list[Term] = []
    for term in walk(limit):
        given = len(term.parts) == 1 and term.op == term.parts[0].op == "const"
        if given and str(term.value) != str(term.parts[0].value) and isinstance(term.value, str):
            return term
        if term.op == "const" and not term.parts and type(term.value) in (int, float) and term.line:
            numbers.append(term)
    near = [one for one in numbers if abs(one.value - seconds) <= 0.25 * seconds]
    return min(near, key=lambda one: abs(one.value - seconds), default=limit)
