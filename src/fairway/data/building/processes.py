"""Work on many cores whose results come back in order: one process for each core, and few items on the way.

Each process has a pipe of its own and ends when that closes, so that none outlives a parent that was killed. An item
that fails raises when its turn comes, whatever the others do: the error is the same with any number of processes.
"""

import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any, TypeVar

from fairway.base.errors import FairwayError

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2  # items that a process has at once: one that it works on, one that waits
WINDOW = 4  # for each process, items between the first that is missing and the last that was handed out


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def workers(make: Callable[[], Callable[[T], R]], processes: int) -> Iterator[Callable[[Iterable[T]], Iterator[R]]]:
    """What maps items in order: `make()` of each process (of this one with 1) does the work. Other threads are best
    started after. FairwayError where a process dies."""
    if processes <= 1:
        work = make()
        yield lambda items: map(work, items)
        return
    team = _Team(make, processes)
    try:
        yield lambda items: team.results(iter(items))
    finally:
        team.end()


class _Team:
    """The processes, and what each has in hand."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], processes: int) -> None:
        # Forked where that is the habit (as loaders of torch do): torch's own code never runs in these processes, and
        # importing it anew would take each 2 s and 200 MB.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.pipes: list[connection.Connection] = []
        self.processes: list[Any] = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, [*self.pipes, ours], make), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forking with numpy's idle threads about
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def results(self, items: Iterator[Any]) -> Iterator[Any]:
        busy = {pipe: list[int]() for pipe in self.pipes}
        done, given, wanted, ended, failed = dict[int, Any](), 0, 0, False, None
        while True:
            while not ended and given - wanted < WINDOW * len(busy):
                pipe = min(busy, key=lambda one: len(busy[one]))
                if len(busy[pipe]) >= AHEAD:
                    break
                try:
                    item = next(items)
                except StopIteration:
                    ended = True
                except Exception as error:  # of the source: what came before it is done first
                    ended, failed = True, error
                else:
                    self._send(pipe, item)
                    busy[pipe].append(given)
                    given += 1
            if wanted in done:
                found = done.pop(wanted)
                wanted += 1
                if isinstance(found, Exception):
                    raise found
                yield found
            elif wanted == given:
                break
            else:
                for ready in connection.wait([pipe for pipe in busy if busy[pipe]]):
                    assert isinstance(ready, connection.Connection)
                    done[busy[ready].pop(0)] = self._receive(ready)
        if failed is not None:
            raise failed

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()

    def _send(self, pipe: connection.Connection, item: Any) -> None:
        try:
            pipe.send(item)
        except OSError as error:
            raise self._died(pipe) from error

    def _receive(self, pipe: connection.Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died(pipe) from error

    def _died(self, pipe: connection.Connection) -> FairwayError:
        process = self.processes[self.pipes.index(pipe)]
        process.join(1)
        how = f"signal {-process.exitcode}" if (process.exitcode or 0) < 0 else f"exit code {process.exitcode}"
        return FairwayError(
            f"worker process {process.pid}: ended by {how}, as where memory runs out; "
            "run the same command again, with fewer --workers"
        )


def _serve(pipe: connection.Connection, others: list[connection.Connection], make: Callable[[], Any]) -> None:
    """One process: item by item until the pipe closes. An exception is a result."""
    for other in others:  # inherited: while they are open here, no other process sees its parent end
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    work, taken = make(), queue.SimpleQueue[Any]()
    # A thread takes what comes: else parent and child could wait for one another, each with a full pipe to write to.
    threading.Thread(target=_take, args=(pipe, taken), daemon=True).start()
    with suppress(OSError):  # the parent is gone
        while (item := taken.get()) is not None:
            pipe.send(_answer(work, item))


def _take(pipe: connection.Connection, taken: "queue.SimpleQueue[Any]") -> None:
    with suppress(EOFError, OSError):
        while True:
            taken.put(pipe.recv())
    taken.put(None)


def _answer(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except FairwayError as error:
        return error
    except MemoryError:
        return FairwayError("worker process: out of memory; run the same command again, with fewer --workers")
    except Exception:  # a mistake of ours: told whole, since not every exception can be sent
        return RuntimeError(traceback.format_exc())
