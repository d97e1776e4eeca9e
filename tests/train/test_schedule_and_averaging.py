"""Schedules at their corners; averages against their closed forms."""

import pytest
import torch

from fairway.train.averaging import Average, AverageSpec
from fairway.train.schedule import ScheduleSpec, done, progress, rate_scale


def test_by_step_the_rate_is_constant_then_falls_linearly_to_its_floor() -> None:
    spec = ScheduleSpec(steps=100, warmdown=40, floor=0.1)
    assert [rate_scale(spec, step, 999.0) for step in (0, 60, 80, 99)] == [1.0, 1.0, 0.5, 0.1]
    assert not done(spec, 99, 1e9)
    assert done(spec, 100, 0.0)
    assert progress(spec, 25, 0.0) == 0.25


def test_by_clock_the_last_w_steps_fall_whatever_the_speed() -> None:
    spec = ScheduleSpec(by="clock", seconds=590.0, steps=20000, warmdown=3500)
    for step_seconds in (0.0978, 0.2):
        step = 1000
        elapsed = step * step_seconds
        window = 3500 * step_seconds
        assert rate_scale(spec, step, elapsed) == pytest.approx(min(1.0, (590 - elapsed) / window))
    assert rate_scale(spec, 6000, 600.0) == 0.0
    assert done(spec, 10, 590.0)


def test_a_warmdown_fraction_takes_that_part_of_the_whole() -> None:
    by_clock = ScheduleSpec(by="clock", seconds=100.0, warmdown_fraction=0.5, floor=0.2)
    assert [rate_scale(by_clock, 7, s) for s in (0.0, 50.0, 75.0, 99.0)] == [1.0, 1.0, 0.5, 0.2]
    by_step = ScheduleSpec(steps=10, warmdown_fraction=1.0)
    assert [rate_scale(by_step, s, 0.0) for s in (0, 5, 9)] == [1.0, 0.5, pytest.approx(0.1)]


@pytest.mark.parametrize("bad", [{"by": "clock"}, {"steps": 0}, {"warmdown_fraction": 1.5}, {"floor": -0.1}])
def test_impossible_schedules_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"seconds|steps|between 0 and 1"):
        ScheduleSpec(**bad)


def walk(average: Average, model: torch.nn.Linear, values: list[float], scale: float = 0.1) -> None:
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(step, scale)


def test_ema_is_the_geometric_sum_of_all_weights() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0)
    average = Average(AverageSpec("ema", decay=0.9), model)
    values = [1.0, -3.0, 5.0]
    walk(average, model, values)
    assert average.replace()
    expected = 0.9**3 * 2.0 + sum(0.1 * 0.9 ** (2 - i) * v for i, v in enumerate(values))
    assert model.weight.item() == pytest.approx(expected)


def test_swa_is_the_mean_of_the_snapshots_it_was_due_to_take() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(AverageSpec("swa", every=2, below=0.2), model)
    walk(average, model, [9.0, 9.0, 9.0], scale=0.5)
    assert not average.replace()
    walk(average, model, [1.0, 2.0, 3.0, 5.0])
    assert average.replace()
    assert model.weight.item() == 3.5


def test_without_averaging_the_weights_stay() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(AverageSpec("none"), model)
    walk(average, model, [4.0])
    assert not average.replace()
    assert model.weight.item() == 4.0
