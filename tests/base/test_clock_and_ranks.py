"""Budgets fall with the same verdict on every rank; shares cover everything once."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairway.base.clock import Stopwatch, hold
from fairway.base.errors import BudgetError, RecipeError
from fairway.base.ranks import Ranks, in_threads


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stopwatch_counts_its_laps_and_what_was_spent_before() -> None:
    time = Time()
    watch = Stopwatch(spent=5.0, now=time)
    time.now += 3.0
    assert watch.seconds == 5.0  # not started yet
    with watch:
        time.now += 2.0
        assert watch.seconds == 7.0
        watch.start()  # already running: nothing is lost
    time.now += 50.0
    assert watch.seconds == watch.stop() == 7.0
    with watch:
        time.now += 1.0
    assert watch.seconds == 8.0


def test_a_budget_holds_up_to_its_limit_and_zero_means_none() -> None:
    hold("artifact", 16_000_000, 16_000_000, "bytes", "prune more")
    hold("artifact", 1e12, 0, "bytes", "prune more")


@pytest.mark.parametrize(
    ("value", "limit", "said"),
    [
        (16_000_001, 16_000_000, "artifact: 16,000,001 bytes is over the limit of 16,000,000; prune more"),
        (600.004, 600.0, "artifact: 600.004 bytes is over the limit of 600; prune more"),
        (0.75, 0.5, "artifact: 0.750 bytes is over the limit of 0.500; prune more"),
        (float("inf"), 1, "artifact: inf bytes is over the limit of 1; prune more"),
    ],
)
def test_over_budget_names_measure_limit_and_remedy(value: float, limit: float, said: str) -> None:
    with pytest.raises(BudgetError) as caught:
        hold("artifact", value, limit, "bytes", "prune more")
    assert str(caught.value) == said


def test_a_measure_that_is_not_a_number_holds_no_budget() -> None:
    with pytest.raises(BudgetError, match="inf s"):
        hold("eval", float("nan"), 600, "s", "measure it")


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_the_shares_of_all_ranks_cover_everything_once_in_order(count: int, world: int) -> None:
    shares = [Ranks(rank, world).share(count) for rank in range(world)]
    assert (shares[0].start, shares[-1].stop) == (0, count)
    assert all(left.stop == right.start for left, right in pairwise(shares))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)  # the first ranks take the remainder


def test_one_process_needs_no_group() -> None:
    ranks, tensor = Ranks(), torch.arange(3.0)
    assert ranks.first
    assert ranks.max(2.5) == 2.5
    assert ranks.sum_(tensor) is tensor
    assert ranks.share_text("a") == "a"
    ranks.wait()
    ranks.stop()


@pytest.mark.parametrize(
    ("variables", "said"),
    [({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"), ({"WORLD_SIZE": "2"}, "RANK = ''.*torchrun")],
)
def test_torchruns_variables_are_checked(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=said):
        Ranks.start(cuda=False)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_ranks_in_threads_are_each_there_once_and_share_as_processes_do(world: int) -> None:
    seen: dict[int, tuple[int, slice, bool]] = {}

    def work(ranks: Ranks) -> None:
        seen[ranks.rank] = (ranks.world, ranks.share(7), ranks.first)

    in_threads(world, work)
    assert seen == {rank: (world, Ranks(rank, world).share(7), rank == 0) for rank in range(world)}


def test_ranks_in_threads_sum_in_the_order_of_the_ranks_and_all_get_the_same() -> None:
    """((1e16 + 1) - 1e16) + 1 = 1 in float64, and in pairs it would be 0. Fifty times over, since threads come in any
    order."""
    parts, found = [1e16, 1.0, -1e16, 1.0], [list[float]() for _ in range(4)]

    def work(ranks: Ranks) -> None:
        for _ in range(50):
            tensor = torch.full((3,), parts[ranks.rank], dtype=torch.float64)
            assert ranks.sum_(tensor) is tensor
            found[ranks.rank] += tensor.tolist()

    in_threads(4, work)
    assert found == [[1.0] * 150] * 4


def test_a_gradient_that_a_rank_in_a_thread_lacks_counts_as_zero() -> None:
    found: dict[int, list[float]] = {}

    def work(ranks: Ranks) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        parameters[0].grad = torch.full((2,), 1.0 + ranks.rank)
        if ranks.rank == 1:
            parameters[1].grad = torch.full((2,), 5.0)
        ranks.sum_gradients(iter(parameters))
        found[ranks.rank] = [float(parameter.grad[0]) for parameter in parameters if parameter.grad is not None]

    in_threads(2, work)
    assert found == {0: [3.0, 5.0], 1: [3.0, 5.0]}


@pytest.mark.parametrize("rank", [0, 2])
def test_the_error_of_a_rank_in_a_thread_surfaces_while_the_others_wait_for_it(rank: int) -> None:
    def work(ranks: Ranks) -> None:
        ranks.sum_(torch.ones(1))
        if ranks.rank == rank:
            raise BudgetError("late")
        ranks.sum_(torch.ones(1))

    with pytest.raises(BudgetError, match="late"):
        in_threads(3, work)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_in_a_thread_that_ends_early_is_an_error_and_no_hang(rank: int) -> None:
    def work(ranks: Ranks) -> None:
        for _ in range(2 if ranks.rank == rank else 3):
            ranks.sum_(torch.ones(1))

    with pytest.raises(RuntimeError, match=f"rank {rank} has ended"):
        in_threads(3, work)


TWO_RANKS = """
from pathlib import Path

import torch
from fairway.base.clock import hold
from fairway.base.errors import BudgetError
from fairway.base.ranks import Ranks, in_threads

ranks = Ranks.start(cuda=False)
said = []
hold("eval", 1.0 + ranks.rank, 2.0, "s", "hurry", ranks)
try:  # only rank 1 is over the limit
    hold("eval", 601.0 if ranks.rank == 1 else 1.0, 600.0, "s", "hurry", ranks)
except BudgetError as error:
    said.append(str(error))
said.append(ranks.share_text(f"from {ranks.rank}"))
said.append(ranks.sum_(torch.tensor([1.0 + ranks.rank])).tolist())
parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))]
parameters += [torch.nn.Parameter(torch.zeros(1))]
parameters[0].grad = torch.full((2, 3), 1.0 + ranks.rank)
parameters[1].grad = torch.full((4,), 10.0 * (1 + ranks.rank), dtype=torch.float64)
if ranks.rank == 1:  # a gradient that one rank lacks counts as zero there
    parameters[2].grad = torch.tensor([5.0])
ranks.sum_gradients(iter(parameters))
said.append([parameter.grad.reshape(-1).tolist() for parameter in parameters])
ranks.wait()
Path(__file__).with_name(f"rank{ranks.rank}").write_text(repr(said))
ranks.stop()
"""


def test_two_ranks_get_the_same_verdict_and_the_same_sums(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    expected = [
        "eval: 601 s is over the limit of 600; hurry",
        "from 0",
        [3.0],
        [[3.0] * 6, [30.0] * 4, [5.0]],
    ]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [repr(expected)] * 2
