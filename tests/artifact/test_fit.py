"""The search for a byte budget: it allocates as Lagrange asks, lands after at most two writings, and says what is
impossible."""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.artifact.fit import SLACK, Choice, Curve, Written, allocate, fit, largest, least
from fairway.base.errors import BudgetError


def high_rate(count: int, weight: float, spread: float = 1.0) -> Curve:
    """Gaussian weights on fine grids: −log2 s bits each and a constant, s²/12 of error each, at `weight` a unit."""
    steps = spread * 2.0 ** np.arange(-7, 1.26, 0.25)
    bits = np.maximum(math.log2(spread * math.sqrt(2 * math.pi * math.e)) - np.log2(steps), 0.05)
    return Curve(steps, (0.0,), (count * bits / 8)[:, None], (weight * count * steps**2 / 12)[:, None])


def test_steps_go_with_the_root_of_the_weight_of_an_error() -> None:
    """At high rate the least damage has one marginal price: c_t s_t² is the same for all tensors (reverse
    water-filling)."""
    curves = {"dear": high_rate(5_000, 16.0).finer(), "cheap": high_rate(40_000, 1.0).finer()}
    choices, _ = allocate(curves, 20_000)
    assert choices["cheap"].step / choices["dear"].step == pytest.approx(4, rel=0.05)
    assert sum(choice.bytes for choice in choices.values()) == pytest.approx(20_000, rel=1e-6)


def test_no_other_choice_of_so_few_bytes_has_less_damage() -> None:
    chance = np.random.default_rng(3)
    curves = {}
    for name in "abc":
        steps, zones = np.array([0.1, 0.2, 0.4, 0.8]), (0.0, 0.1)
        sizes = chance.uniform(0.9, 1.1, (4, 2)) * np.array([[800.0], [600], [400], [200]])
        curves[name] = Curve(steps, zones, sizes, chance.uniform(0.8, 1.2, (4, 2)) * steps[:, None] ** 2)
    for wanted in (900.0, 1200.0, 1700.0, 2100.0):
        choices, _ = allocate(curves, wanted)
        found = sum(choice.damage for choice in choices.values())
        size = sum(choice.bytes for choice in choices.values())
        assert size <= wanted * 1.0001
        everything = itertools.product(*(np.ndindex(4, 2) for _ in "abc"))
        best = min(
            (
                sum(curves[name].damage[place] for name, place in zip("abc", places, strict=True))
                for places in everything
                if sum(curves[name].bytes[place] for name, place in zip("abc", places, strict=True)) <= size
            ),
            default=math.inf,
        )
        assert found <= best * 1.15, "between two hull points a common stretch may lose a little, no more"


@dataclass
class Tensor:
    """What a pretended solve gives back."""

    entropy_bytes: float
    damage: float


class World:
    """A coder and a solver whose habits the search does not know: bytes per entropy by group, everything else, and
    codes that come out longer than foretold the coarser the step."""

    def __init__(self, curves: dict[str, Curve], rest: int, seed: int) -> None:
        chance = np.random.default_rng(seed)
        self.curves, self.rest, self.writings = curves, rest, 0
        self.coder = {name: chance.uniform(0.93, 1.08) for name in curves}
        self.longer = {name: chance.uniform(0.0, 0.06) for name in curves}

    def solve(self, choices: dict[str, Choice], price: float) -> dict[str, Tensor]:
        assert price > 0
        return {name: Tensor(choice.bytes / self.told(name, choice), choice.damage) for name, choice in choices.items()}

    def told(self, name: str, choice: Choice) -> float:
        """Undoes what the search has learned: the true entropy depends on the step alone."""
        curve = self.curves[name]
        law = float(np.interp(math.log(choice.step), np.log(curve.steps), curve.bytes[:, 0]))
        return choice.bytes / (law * (1 + self.longer[name] * choice.step / curve.steps[-1]))

    def write(self, solved: dict[str, Tensor]) -> Written:
        self.writings += 1
        codes = {name: round(self.coder[name] * one.entropy_bytes) for name, one in solved.items()}
        return Written(self.rest + sum(codes.values()), codes, {name: name for name in solved})


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.95), rest=st.integers(500, 40_000))
def test_the_file_lands_within_the_slack_after_at_most_two_writings(seed: int, share: float, rest: int) -> None:
    chance = np.random.default_rng(seed)
    curves = {
        name: high_rate(int(chance.integers(2_000, 200_000)), 10 ** chance.uniform(-4, 1), 10 ** chance.uniform(-2, 0))
        for name in "abcdef"
    }
    world = World(curves, rest, seed)
    small, large = rest + 1.15 * least(curves), rest + 0.9 * largest(curves)
    budget = int(small + share * (large - small))
    found = fit(budget, curves, rest * 0.8, world.solve, world.write)
    assert (1 - SLACK) * budget < found.bytes <= budget
    assert found.landed
    assert world.writings == found.writings <= 2


def test_a_budget_above_the_largest_useful_file_is_reported_and_not_padded() -> None:
    curves = {"a": high_rate(10_000, 1.0)}
    world = World(curves, 1_000, 1)
    found = fit(1_000_000, curves, 1_000.0, world.solve, world.write)
    assert found.full
    assert found.landed
    assert found.bytes < 20_000
    assert found.largest == pytest.approx(found.bytes, rel=0.01)
    assert world.writings == 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.2))
def test_a_budget_that_nothing_fits_names_the_size_of_the_smallest_file(seed: int, share: float) -> None:
    """Whatever too small budget is asked for, the answer is one and the same size; and that size is enough."""
    curves = {"a": high_rate(10_000, 1.0), "b": high_rate(30_000, 0.1)}
    coarsest = {name: Choice(curve.steps[-1], 0.0, float(curve.bytes[-1, 0]), 1.0) for name, curve in curves.items()}
    world = World(curves, 7_000, seed)
    smallest = world.write(world.solve(coarsest, 1.0)).bytes
    budget = int(share * smallest)
    try:
        said, size = "", fit(max(budget, 1), curves, 6_000.0, world.solve, world.write).bytes
    except BudgetError as error:
        said, size = str(error), smallest
    assert said.endswith(f"the least possible file has {smallest:,}; raise the budget to {smallest:,}") or not said
    assert (budget < smallest) == bool(said)
    assert smallest <= size
    assert fit(smallest, curves, 6_000.0, world.solve, world.write).bytes == smallest


def test_what_lies_beside_the_file_is_counted_in_the_answer() -> None:
    world = World({"a": high_rate(10_000, 1.0)}, 7_000, 2)
    with pytest.raises(BudgetError, match=r"fit: 61,000 bytes, 60,000 of them code, cannot hold") as refused:
        fit(1_000, world.curves, 7_000.0, world.solve, world.write, beside=60_000)
    least_file, named = (
        int(word.replace(",", "")) for word in re.findall(r"file has ([\d,]+);.* to ([\d,]+)", str(refused.value))[0]
    )
    assert named == least_file + 60_000


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.9, 1.1))
def test_just_below_the_largest_useful_file_a_file_lands_or_is_that_file(seed: int, share: float) -> None:
    curves = {"a": high_rate(100_000, 1.0), "b": high_rate(30_000, 0.1)}
    world = World(curves, 5_000, seed)
    finest = {name: Choice(curve.steps[0], 0.0, float(curve.bytes[0, 0]), 1.0) for name, curve in curves.items()}
    largest_file = world.write(world.solve(finest, 1.0)).bytes
    budget = int(share * largest_file)
    found = fit(budget, curves, 5_000.0, world.solve, world.write)
    assert found.landed
    assert found.full == (found.bytes == largest_file)
    assert found.full or (1 - SLACK) * budget < found.bytes <= budget


def test_a_coder_that_jumps_is_an_error_and_not_a_file_over_its_budget() -> None:
    curves = {"a": high_rate(100_000, 1.0)}

    def write(solved: dict[str, Tensor]) -> Written:
        return Written(60_000, {"a": 59_000}, {"a": "a"})

    world = World(curves, 1_000, 3)
    with pytest.raises(BudgetError, match=r"files of 60,000 and 60,000 bytes for a budget of 50,000"):
        fit(50_000, curves, 1_000.0, world.solve, write)


def test_when_the_second_file_is_too_large_the_first_one_stays() -> None:
    curves, sizes = {"a": high_rate(100_000, 1.0)}, iter((45_000, 50_100))

    def write(solved: dict[str, Tensor]) -> Written:
        size = next(sizes)
        return Written(size, {"a": size - 1_000}, {"a": "a"})

    world = World(curves, 1_000, 3)
    found = fit(50_000, curves, 1_000.0, world.solve, write)
    assert found.bytes == 45_000
    assert not found.landed
    assert found.writings == 2


def test_curves_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Curve(np.array([0.2, 0.1]), (0.0,), np.ones((2, 1)), np.ones((2, 1)))
