"""Work that processes forked from this one do beside it: they have all that was made so far, and what they find comes
back pickled. Where the system cannot fork, it is done here, with the same result.

    Aside(work)                 begins it; .result() waits for it
    shared(tasks, processes)    what each task gives, in their order; every process takes the next one when it is done
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_LOOK = 1.0  # seconds between two looks whether the process that asked is still there


class LostError(Exception):
    """A forked process ended and said nothing, for want of memory, or because what it made cannot be sent."""


class Aside(Generic[T]):
    """One piece of work in a process of its own."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work, self._reads = work, -1
        if not hasattr(os, "fork"):
            return
        self._reads, writes = os.pipe()
        asks = os.getpid()
        self._child = os.fork()
        if not self._child:
            _answer(work, writes, asks)
        os.close(writes)

    def result(self) -> T:
        """What it gave, once. Raises what it raised; LostError where its process ended without a word."""
        if self._reads < 0:
            return self._work()
        with os.fdopen(self._reads, "rb") as pipe:
            said = pipe.read()
        os.waitpid(self._child, 0)
        if not said:
            raise LostError("a process beside this one ended and said nothing")
        value, error = pickle.loads(said)
        if error is not None:
            raise error
        made: T = value
        return made


def _answer(work: Callable[[], Any], writes: int, asks: int) -> None:
    """In the forked process, which ends here: no clean-up of what belongs to the other one. asks: the other's number,
    for it may be gone already."""

    def look(*_: Any) -> None:
        if os.getppid() != asks:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
    try:
        try:
            made, error = work(), None
        except Exception as raised:  # whatever it is: the other process raises it
            made, error = None, raised
        said = pickle.dumps((made, None)) if error is None else _pickled(error)
        with os.fdopen(writes, "wb") as pipe:
            pipe.write(said)
    finally:  # what is nested too deeply to be pickled, and all else that went wrong, is not said
        os._exit(0)


def _pickled(error: Exception) -> bytes:
    try:
        said = pickle.dumps((None, error))
        pickle.loads(said)
    except Exception:  # an error whose arguments are not those of its class
        said = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    return said


def shared(tasks: Sequence[Callable[[], T]], processes: int) -> list[T]:
    """What the tasks give, in their order. What a process took and never gave back is done again here."""
    more = min(processes, len(tasks)) - 1
    if more < 1 or not hasattr(os, "fork"):
        return [task() for task in tasks]
    claims, left = os.pipe()
    os.write(left, bytes(range(len(tasks))))
    os.close(left)
    crew = [Aside(partial(_served, tasks, claims)) for _ in range(more)]
    made = _served(tasks, claims)
    os.close(claims)
    for each in crew:
        try:
            made |= each.result()
        except LostError:
            continue
    return [made[n] if n in made else task() for n, task in enumerate(tasks)]


def _served(tasks: Sequence[Callable[[], T]], claims: int) -> dict[int, T]:
    """What this process made, by number. A byte of the pipe is a claim that no other process can read again."""
    made: dict[int, T] = {}
    while claim := os.read(claims, 1):
        made[claim[0]] = tasks[claim[0]]()
    return made


__all__ = ["Aside", "LostError", "shared"]
