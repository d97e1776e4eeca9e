"""Batches made in the background: the next few are ready, on pinned memory for a GPU, when a step asks for one."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from fairway.base.ranks import Ranks
from fairway.data.batches import Batches

Batch = tuple[Tensor, Tensor]


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) prepares batches ahead."""
    return bool(recipe["data"]["ahead"])


class Ahead:
    """`Batches` whose next `depth` batches a thread prepares: the same batches, in whatever order they are asked for.

    An error of the thread is raised where its batch is asked for. To be used in `with`, which ends the thread.
    """

    def __init__(self, batches: Batches, depth: int, pin: bool = False) -> None:
        self.batches, self.depth, self.pin = batches, depth, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: dict[int, Future[Batch]] = {}

    def batch(self, step: int, ranks: Ranks | None = None) -> Batch:
        """As that of `Batches`; a rank asks for its own share alone."""
        near = range(step, step + self.depth + 1)
        for far in self._made.keys() - set(near):
            self._made.pop(far).cancel()
        for number in near:
            if number not in self._made:
                self._made[number] = self._thread.submit(self._make, number, ranks)
        return self._made.pop(step).result()

    def _make(self, step: int, ranks: Ranks | None) -> Batch:
        inputs, targets = self.batches.batch(step, ranks)
        return (inputs.pin_memory(), targets.pin_memory()) if self.pin else (inputs, targets)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
