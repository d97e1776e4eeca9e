"""Pools, threads, queues and stacks of contexts: in a trial all that is handed over is done at once."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

from fairway.audit.trial.arrays import Array
from fairway.audit.trial.core import Core
from fairway.audit.trial.values import UNKNOWN, Obj, Raised, Value

AHEAD = 24  # items: a producer of training data goes on for ever


class _Enough(BaseException):
    """A producer has made enough."""


def _of_another_text(value: Value) -> bool:
    """Whether an item holds arrays, and none of them ids of the text."""
    held = list(_arrays(value))
    return bool(held) and not any(each.pos is not None and bool((each.pos >= 0).any()) for each in held)


def _arrays(value: Value, deep: int = 0) -> Iterator[Array]:
    if isinstance(value, Array):
        yield value
    elif deep < 3:
        parts = value.vars.values() if isinstance(value, Obj) else value if isinstance(value, (list, tuple)) else ()
        for each in parts:
            yield from _arrays(each, deep + 1)


class Future:
    def __init__(self, value: Value) -> None:
        self.value = value

    def result(self, *_: Value, **__: Value) -> Value:
        return self.value

    get = result

    def done(self) -> bool:
        return True


class Executor:
    """ThreadPoolExecutor, ThreadPool."""

    def __init__(self, machine: Core) -> None:
        self._machine = machine

    def submit(self, func: Value, *args: Value, **kwargs: Value) -> Future:
        return Future(self._machine.call(func, args, kwargs, 0))

    def apply_async(self, func: Value, args: Value = (), kwargs: Value = None) -> Future:
        return self.submit(func, *args, **(kwargs or {}))

    def map(self, func: Value, *sources: Value, **_: Value) -> Value:
        machine = self._machine
        each = zip(*[machine.items(one) for one in sources], strict=False)
        return iter([machine.call(func, args, {}, 0) for args in each])

    imap = map

    def shutdown(self, *_: Value, **__: Value) -> None:
        return None

    close = join = shutdown

    def entered(self) -> Executor:
        return self


class Thread:
    """threading.Thread: its function is run when it is started."""

    def __init__(self, machine: Core, kwargs: dict[str, Value]) -> None:
        self._machine = machine
        self._given = kwargs
        self.daemon = True

    def start(self) -> None:
        given = self._given
        if given.get("target") is None:
            return
        self._machine.in_thread += 1
        try:
            self._machine.call(given["target"], tuple(given.get("args", ())), dict(given.get("kwargs") or {}), 0)
        except _Enough:
            return
        finally:
            self._machine.in_thread -= 1

    def join(self, *_: Value, **__: Value) -> None:
        return None

    def is_alive(self) -> bool:
        return False


class Queue:
    """queue.Queue, without an end: its producer has run to its last item before anybody asks."""

    def __init__(self, machine: Core) -> None:
        self._machine = machine
        self._held: collections.deque[Value] = collections.deque()

    def put(self, value: Value, *_: Value, **__: Value) -> None:
        self._held.append(value)
        if self._machine.in_thread and len(self._held) >= AHEAD and _of_another_text(value):
            raise _Enough

    def get(self, *_: Value, **__: Value) -> Value:
        if not self._held:
            raise Raised("Empty")
        return self._held.popleft()

    put_nowait, get_nowait = put, get

    def empty(self) -> bool:
        return not self._held

    def qsize(self) -> int:
        return len(self._held)

    __len__ = qsize

    def task_done(self) -> None:
        return None

    join = task_done


class Store:
    """torch.distributed's store: counters and values that ranks share."""

    def __init__(self) -> None:
        self._held: dict[Value, Value] = {}

    def add(self, key: Value, amount: Value) -> Value:
        before = self._held.get(key, 0)
        self._held[key] = before + amount if isinstance(before, int) and isinstance(amount, int) else UNKNOWN
        return self._held[key]

    def set(self, key: Value, value: Value) -> None:
        self._held[key] = value

    def get(self, key: Value, *_: Value) -> Value:
        return self._held.get(key, UNKNOWN)

    def wait(self, *_: Value, **__: Value) -> None:
        return None


class Event:
    """torch.cuda.Event: a reading of the clock where it is recorded."""

    def __init__(self, machine: Core) -> None:
        self._machine = machine
        self.at: Value = UNKNOWN

    def record(self, *_: Value) -> None:
        self.at = self._machine.read_clock()

    def elapsed_time(self, other: Value) -> Value:
        """Milliseconds."""
        if not isinstance(other, Event) or UNKNOWN in (self.at, other.at):
            return UNKNOWN
        return 1000.0 * (other.at - self.at)

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Graph:
    """torch.cuda.CUDAGraph: what was captured is done again by replay()."""

    def __init__(self) -> None:
        self.body: Callable[[], Value] | None = None

    def replay(self) -> None:
        if self.body is not None:
            self.body()


class Capture:
    """torch.cuda.graph(graph): the block under it is what the graph captures."""

    def __init__(self, graph: Value) -> None:
        self.graph = graph


class Suppress:
    """contextlib.suppress, of whatever is raised."""

    def left(self, error: Raised | None) -> bool:
        return error is not None


class Stack:
    """contextlib.ExitStack."""

    def __init__(self, machine: Core) -> None:
        self._machine = machine
        self._held: list[Value] = []

    def entered(self) -> Stack:
        return self

    def enter_context(self, manager: Value) -> Value:
        self._held.append(manager)
        return self._machine.enter(manager)

    def callback(self, func: Value, *args: Value, **kwargs: Value) -> Value:
        return func

    push = callback

    def close(self) -> None:
        self.left(None)

    def left(self, error: Raised | None) -> bool:
        while self._held:
            self._machine.leave(self._held.pop(), error)
        return False


__all__ = ["Capture", "Event", "Executor", "Future", "Graph", "Queue", "Stack", "Suppress", "Thread"]
