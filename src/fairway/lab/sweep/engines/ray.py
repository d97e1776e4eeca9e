"""Ray: this machine alone, or the cluster that RAY_ADDRESS names.

All its machines must see the same files under the same paths.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fairway.base.errors import RecipeError
from fairway.lab.sweep.engines import Crew, Event, keep
from fairway.lab.sweep.one import Ended, Job, python_path, run_one


@dataclass(frozen=True)
class Spec:
    """Nothing to choose here: Ray's own variables say where it lies."""


def elsewhere() -> bool:
    return "RAY_ADDRESS" in os.environ


def run(jobs: Sequence[Job], crew: Crew) -> Iterator[Event]:
    try:
        import ray
    except ModuleNotFoundError:
        raise RecipeError("--engine ray: needs the extra `ray`: pip install 'fairway[ray]'") from None
    settings: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": python_path()}}, "log_to_driver": False}
    if not jobs:
        return
    if "RAY_ADDRESS" not in os.environ:  # a Ray of our own: no dashboard, no more runs at once than asked for
        settings |= {"num_cpus": crew.width * crew.threads, "include_dashboard": False}
    ray.init(logging_level="ERROR", **settings)
    try:
        remote = ray.remote(num_cpus=crew.threads, num_gpus=int(bool(crew.gpus)), max_retries=0)(run_one)
        yield from keep(jobs, crew.width, lambda job, _: _Task(job, remote.remote(job)))
    finally:
        ray.shutdown()


class _Task:
    """A run on Ray."""

    def __init__(self, job: Job, reference: Any) -> None:
        self.job, self.reference = job, reference

    def poll(self) -> Ended | None:
        import ray

        ready, _ = ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            return ray.get(self.reference)
        except ray.exceptions.TaskCancelledError:
            return Ended(self.job.id, 0.0, "interrupted", interrupted=True)
        except ray.exceptions.RayError as error:  # its worker or its machine is lost
            return Ended(self.job.id, 0.0, f"ray: {str(error).strip().partition(chr(10))[0]}")

    def stop(self) -> None:
        import ray

        ray.cancel(self.reference, force=False)

    def kill(self) -> None:
        import ray

        ray.cancel(self.reference, force=True)
