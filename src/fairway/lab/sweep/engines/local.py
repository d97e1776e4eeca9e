"""This machine: a process for each run, on a GPU of its own where there are some."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fairway.lab.sweep.engines import Crew, Event, keep
from fairway.lab.sweep.one import Child, Job


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


def elsewhere() -> bool:
    """Whether runs go to other machines than this one."""
    return False


def run(jobs: Sequence[Job], crew: Crew) -> Iterator[Event]:
    yield from keep(jobs, crew.width, lambda job, place: Child(job, crew.gpus[place] if crew.gpus else None))
