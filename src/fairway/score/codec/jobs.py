"""Parts are independent of each other: one process for each core writes or reads them."""

import concurrent.futures as futures
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairway.artifact import Artifact, open_artifact
from fairway.base.devices import threads
from fairway.base.journal import Run

# Fewer tokens are done before two processes have started (2.5 s each to import torch).
ALONE = 8_000


@dataclass(frozen=True)
class Job:
    """A function of this package's modules, and what it is called with after the artifact and beside `progress`;
    `tokens` is its size."""

    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    tokens: int


def run_jobs(artifact: Artifact, jobs: Sequence[Job], run: Run, label: str, processes: int = 1) -> Iterator[Any]:
    """The jobs' results, in order. processes: at most so many, 0: one for each core; work for one is done here."""
    total = sum(job.tokens for job in jobs)
    count = min(processes or _cores(), len(jobs))
    with run.meter(label, total, "tokens") as meter:
        if count < 2 or total < ALONE:
            done = 0
            for job in jobs:
                begun = done
                yield job.work(
                    artifact, *job.arguments, progress=lambda tokens, begun=begun: meter.update(begun + tokens)
                )
                done += job.tokens
            return
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half alive
        tally, stop = context.Array("q", len(jobs)), context.Event()
        others = set(multiprocessing.active_children())
        pool = futures.ProcessPoolExecutor(count, context, _start, (artifact.path, tally, stop))
        try:
            with _deaf():
                waiting = [pool.submit(_do, number, job) for number, job in enumerate(jobs)]
            for future in waiting:
                while not future.done():
                    futures.wait([future], timeout=0.5)
                    meter.update(sum(tally[:]))
                yield future.result()
            meter.update(total)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            _end(set(multiprocessing.active_children()) - others)
            raise
        pool.shutdown()


@contextmanager
def _deaf() -> Iterator[None]:
    """What is started within never hears a terminal's Ctrl-C, which would meet it importing torch and print where; here
    it waits until the start is over."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(workers: set[Any]) -> None:
    """Workers end at their next sign of progress. One that was killed while it wrote its result would leave half of it
    in a pipe, which the pool then waits for: only those that show no sign for long are."""
    patience = time.monotonic() + 10.0
    while any(worker.is_alive() for worker in workers) and time.monotonic() < patience:
        time.sleep(0.05)
    for worker in workers:
        if worker.is_alive():
            worker.terminate()


_held: dict[str, Any] = {}  # of a worker: the opened artifact, the tally it shares with the others, the sign to stop


def _start(path: Path, tally: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the first process ends the others
    _held["artifact"], _held["tally"], _held["stop"] = open_artifact(path), tally, stop


def _do(number: int, job: Job) -> Any:
    def progress(tokens: int) -> None:
        _held["tally"][number] = tokens
        if _held["stop"].is_set():
            raise RuntimeError("stopped from outside")

    with threads(1):
        return job.work(_held["artifact"], *job.arguments, progress=progress)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
