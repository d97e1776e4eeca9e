"""Parts are independent of each other: one process for each core writes or reads them."""

import concurrent.futures as futures
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
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
        tally = context.Array("q", len(jobs))
        others = set(multiprocessing.active_children())
        pool = futures.ProcessPoolExecutor(count, context, _start, (artifact.path, tally))
        try:
            waiting = [pool.submit(_do, number, job) for number, job in enumerate(jobs)]
            for future in waiting:
                while not future.done():
                    futures.wait([future], timeout=0.5)
                    meter.update(sum(tally[:]))
                yield future.result()
            meter.update(total)
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:  # a worker would finish its job first
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_held: dict[str, Any] = {}  # of a worker: the opened artifact, and the tally it shares with the others


def _start(path: Path, tally: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the first process ends the others
    _held["artifact"], _held["tally"] = open_artifact(path), tally


def _do(number: int, job: Job) -> Any:
    def progress(tokens: int) -> None:
        _held["tally"][number] = tokens

    with threads(1):
        return job.work(_held["artifact"], *job.arguments, progress=progress)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
