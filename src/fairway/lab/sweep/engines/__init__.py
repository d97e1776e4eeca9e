"""Slot: where the runs of a sweep go. An engine starts a run somewhere and says when it has ended; nothing more.

    elsewhere() -> whether runs go to other machines, whose devices are not known here
    run(jobs, crew) -> Iterator of a Job that was started, an `Ended`, or None: a moment to show progress

Whoever closes the iterator early (Ctrl-C) waits until the runs that are on their way have written their checkpoints.
All engines run the same process (`one`), so equal jobs give equal numbers.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from fairway.base.errors import RecipeError
from fairway.data.building.processes import cores
from fairway.lab.sweep.one import Ended, Job

PAUSE = 0.2  # seconds between looks


@dataclass(frozen=True)
class Crew:
    """How many runs at once, how many threads each has on a CPU, and the GPUs that they share out, one each."""

    width: int
    threads: int
    gpus: tuple[str, ...] = ()


class Handle(Protocol):
    """A run on its way."""

    def poll(self) -> Ended | None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


Event = Job | Ended | None


def crew(jobs: int | None, gpus: Sequence[str]) -> Crew:
    """The crew for this machine. jobs: None is one run for each GPU, or for each core, which then has one thread.

    RecipeError where there is none, or more than GPUs."""
    if jobs is not None and jobs < 1:
        raise RecipeError(f"--jobs {jobs}: at least 1 run at a time is needed")
    if gpus and jobs is not None and jobs > len(gpus):
        raise RecipeError(f"--jobs {jobs}: {len(gpus)} GPUs here, and each holds one run; ask for no more")
    # A run of one thread on every core, rather than one run on all: runs do not wait for one another, threads do. On
    # two quiet cores two pocket_b6 runs of one thread make 2.47 steps/s each, one of two threads 3.98; where others
    # use the cores, too (load 17), a step took 0.52 s of processor time on one thread and 3.8 s on two.
    width = jobs or len(gpus) or cores()
    return Crew(width, max(cores() // width, 1), tuple(gpus))


def crew_elsewhere(jobs: int | None, runs: int, device: str) -> Crew:
    """The crew for machines that are not this one: as many runs at once as asked for, else all; a GPU for each, unless
    `device` is cpu."""
    if jobs is not None and jobs < 1:
        raise RecipeError(f"--jobs {jobs}: at least 1 run at a time is needed")
    width = jobs or max(runs, 1)
    return Crew(width, 1, () if device == "cpu" else ("any",) * width)


def gpus_here() -> tuple[str, ...]:
    """The names of the GPUs that this process may use."""
    import torch

    asked = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return tuple(asked if len(asked) == count and asked[0] else map(str, range(count)))


def keep(jobs: Sequence[Job], width: int, start: Callable[[Job, int], Handle]) -> Iterator[Event]:
    """Keeps `width` runs on their way, in order, until all have ended. start(job, place): with place < width, no two
    runs in one place."""
    waiting, running = list(jobs), dict[int, Handle]()
    training = dict[int, str]()  # what is being trained where: those that will take its weights wait for it
    try:
        while waiting or running:
            for place in range(width):
                held = {training[other] for other in running}
                free = [job for job in waiting if not job.training or job.training not in held]
                if place not in running and free:
                    job = free[0]
                    waiting.remove(job)
                    training[place] = job.training
                    running[place] = start(job, place)
                    yield job
            for place, handle in list(running.items()):
                if ended := handle.poll():
                    del running[place]
                    yield ended
            yield None
            time.sleep(PAUSE)
    finally:
        _stop(list(running.values()))


def _stop(handles: list[Handle]) -> None:
    """Lets runs write their checkpoints; a second Ctrl-C does not."""
    try:
        for handle in handles:
            handle.stop()
        while any([handle.poll() is None for handle in handles]):
            time.sleep(PAUSE)
    except BaseException:
        for handle in handles:
            with suppress(OSError):
                handle.kill()
        raise
