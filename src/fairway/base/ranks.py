"""Ranks: one training run over several processes, started by torchrun (RANK, LOCAL_RANK and WORLD_SIZE, nothing else).

Every decision that ends or redirects a run is taken on numbers that all ranks share; a check on one rank alone would
leave the others waiting in a collective.
"""

import importlib
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fairway.base.errors import RecipeError


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world` processes."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    @staticmethod
    def start(cuda: bool) -> "Ranks":
        """Reads torchrun's variables and opens the process group where there is more than one process."""
        world = _variable("WORLD_SIZE", "1")
        if world == 1:
            return Ranks()
        ranks = Ranks(_variable("RANK"), world, _variable("LOCAL_RANK", "0"))
        if cuda:
            torch.cuda.set_device(ranks.local_rank)
        if not dist.is_initialized():
            # Optimisers import it sooner or later; imported after the group it would hold the group for ever, whose
            # threads then outlive the interpreter: one run in three ended with SIGABRT on a rank.
            importlib.import_module("torch._dynamo")
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        return ranks

    def stop(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def share(self, count: int) -> slice:
        """This rank's contiguous part of `count` things; the first ranks take the remainder."""
        each, extra = divmod(count, self.world)
        start = self.rank * each + min(self.rank, extra)
        return slice(start, start + each + (self.rank < extra))

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums the gradients over the ranks, in one flat buffer for each dtype (a missing gradient counts as zero)."""
        if self.world == 1:
            return
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter)
        for group in by_dtype.values():
            grads = [p.grad for p in group if p.grad is not None]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            for grad, piece in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
                grad.copy_(piece.view_as(grad))

    def reduce_scatter(self, stack: torch.Tensor) -> "Pending":
        """Starts to sum a tensor over the ranks, of which each keeps its part of the leading axis, a multiple of
        `world`."""
        if self.world == 1:
            return Pending(stack)
        part = stack.new_empty(len(stack) // self.world, *stack.shape[1:])
        start = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.13
        return Pending(part, start(part, stack, async_op=True))

    def all_gather(self, part: torch.Tensor) -> "Pending":
        """Starts to put the ranks' parts together again along the leading axis, in the order of the ranks."""
        if self.world == 1:
            return Pending(part)
        stack = part.new_empty(len(part) * self.world, *part.shape[1:])
        start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        return Pending(stack, start(stack, part, async_op=True))

    def max(self, value: float) -> float:
        """The largest of one number over the ranks; all ranks get the same answer."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor.item())

    def share_text(self, text: str) -> str:
        """Rank 0's text on every rank."""
        if self.world == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    @property
    def device(self) -> str:
        """Where tensors lie that are shared with other ranks."""
        return f"cuda:{self.local_rank}" if self.world > 1 and dist.get_backend() == "nccl" else "cpu"


@dataclass(frozen=True)
class Pending:
    """A tensor that other ranks are still adding to."""

    tensor: torch.Tensor
    work: Any = None  # None: it is there

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


class _Shared:
    """What ranks in threads have in common."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.given: list[torch.Tensor | None] = [None] * world  # None: this rank has ended

    def meet(self, rank: int, tensor: torch.Tensor | None) -> list[torch.Tensor]:
        """Every rank's tensor, once all have come. RuntimeError on those that still sum when another has ended: they
        would wait for it for ever."""
        self.given[rank] = tensor
        self.barrier.wait()
        found = [given for given in self.given if given is not None]
        if tensor is not None and len(found) < len(self.given):
            raise RuntimeError(f"rank {self.given.index(None)} has ended, and rank {rank} waits for its sum")
        return found


@dataclass(frozen=True)
class _ThreadRanks(Ranks):
    """One of several ranks that are threads of one process: sums alone, in the order of the ranks."""

    shared: _Shared = field(default_factory=lambda: _Shared(1))

    @property
    def device(self) -> str:
        return "cpu"

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        first, *others = self.shared.meet(self.rank, tensor.clone())
        total = first.clone()
        for other in others:
            total += other
        tensor.copy_(total)
        self.shared.barrier.wait()  # all have read what was given
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.sum_(parameter.grad)


def in_threads(world: int, work: Callable[[Ranks], None]) -> None:
    """Runs `work` once for each of `world` ranks, in threads of this process: what does not depend on the number of
    ranks must come out the same. Only sums are offered. The error that came first is raised."""
    shared, errors = _Shared(world), list[BaseException]()

    def one(rank: int) -> None:
        try:
            work(_ThreadRanks(rank, world, 0, shared))
            shared.meet(rank, None)
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            shared.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _variable(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal():
        raise RecipeError(f"{name} = {text!r}: a whole number is expected; start several ranks with torchrun")
    return int(text)
