"""Slurm, through submitit: a batch job for each run. Where no `sbatch` is found, submitit's own local processes.

Partition, account and time limit are sbatch's own variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT), which
stand above what is asked for here. All machines must see the same files under the same paths.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fairway.base.errors import RecipeError
from fairway.lab.sweep.engines import Crew, Event, keep
from fairway.lab.sweep.one import Ended, Job, run_one

MINUTES = 240  # for one run: the challenge's take 25, the rest is for slower machines


@dataclass(frozen=True)
class Spec:
    """Nothing to choose here: sbatch's own variables say where it runs."""


def elsewhere() -> bool:
    return shutil.which("sbatch") is not None


def run(jobs: Sequence[Job], crew: Crew) -> Iterator[Event]:
    try:
        import submitit
    except ModuleNotFoundError:
        raise RecipeError("--engine slurm: needs the extra `slurm`: pip install 'fairway[slurm]'") from None
    if not jobs:
        return
    executor = submitit.AutoExecutor(folder=jobs[0].folder.parent / ".slurm")
    executor.update_parameters(
        name="fairway", timeout_min=MINUTES, cpus_per_task=crew.threads, gpus_per_node=int(bool(crew.gpus))
    )
    yield from keep(jobs, crew.width, lambda job, _: _Batch(job, executor.submit(run_one, job)))


class _Batch:
    """A run as a batch job."""

    def __init__(self, job: Job, batch: Any) -> None:
        self.job, self.batch = job, batch

    def poll(self) -> Ended | None:
        if not self.batch.done():
            return None
        try:
            return self.batch.result()
        except Exception as error:  # submitit raises what the job raised, or its own words on a job that was lost
            return Ended(self.job.id, 0.0, f"slurm: {str(error).strip().partition(chr(10))[0]}")

    def stop(self) -> None:
        self.batch.cancel(check=False)

    def kill(self) -> None:
        self.batch.cancel(check=False)
