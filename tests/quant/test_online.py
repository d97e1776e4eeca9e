"""Hessians gathered while training: when, of what, through a checkpoint, and what where none came due."""

from pathlib import Path

import pytest
import torch

from fairway.base.devices import choose
from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.base.specs import build
from fairway.model import GPT, projections
from fairway.quant import Hessians, QuantSpec, gather, observed, read_hessians
from fairway.quant.calibration import online
from fairway.train import ScheduleSpec, TrainSpec, pretrain
from fairway.train.schedule import rate_scale
from tests.quant.conftest import VOCAB, small_model

STILL = {
    "matrix": {"kind": "muon", "lr": 0.0},
    "table": {"kind": "adamw", "lr": 0.0},
    "gain": {"kind": "adamw", "lr": 0.0},
}


class Text:
    """Four windows a step, told apart by the step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def batch(self, step: int, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        if step == self.stop_at:
            raise KeyboardInterrupt
        rows = torch.randint(0, VOCAB, (4, 17), generator=torch.Generator().manual_seed(step))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def trained(
    folder: Path, table: dict[str, object], optim: dict[str, object] | None = None, text: Text | None = None
) -> GPT:
    """A model after 12 steps, the last four of them at falling rates (0.75, 0.5, 0.25 the last three), looked on."""
    model, quant = small_model(), build(QuantSpec, {"calibration": {"kind": "online", **table}})
    spec = TrainSpec(64, schedule=ScheduleSpec(steps=12, warmdown=4), warmup_steps=0, checkpoint_seconds=0.0)
    spec = build(TrainSpec, {**vars_of(spec), "optim": optim}) if optim else spec
    with Run(folder) as run:
        observer = online.observer(quant, model, observed(model, quant), run)
        assert observer is not None
        pretrain(model, text or Text(), spec, run, choose("cpu"), seed=0, observer=observer)
        observer.finish()
    return model


def vars_of(spec: TrainSpec) -> dict[str, object]:
    from fairway.base.specs import to_plain

    return dict(to_plain(spec))


def kept(folder: Path) -> Hessians:
    return read_hessians(folder / online.OBSERVED)


def test_on_weights_that_stand_still_it_is_calibration_on_the_same_batches(tmp_path: Path) -> None:
    model = trained(tmp_path, {"every": 1, "start_scale": 1.0}, STILL)
    fresh = small_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    expected = gather(fresh, [Text().batch(step, Ranks())[0] for step in range(12)])
    assert sorted(kept(tmp_path)) == sorted(expected)
    for name, hessian in kept(tmp_path).items():
        torch.testing.assert_close(hessian, expected[name], rtol=1e-4, atol=1e-6)


def test_it_begins_when_the_rates_fall_and_looks_every_so_many_steps(tmp_path: Path) -> None:
    """Rates 0.75, 0.5, 0.25 after steps 10, 11, 12: below 0.6 every second step, the twelfth alone."""
    trained(tmp_path, {"every": 2, "start_scale": 0.6}, STILL)
    expected = gather(small_model(), [Text().batch(11, Ranks())[0]])
    for name, hessian in kept(tmp_path).items():
        torch.testing.assert_close(hessian, expected[name], rtol=1e-4, atol=1e-6)


def test_old_gatherings_fade(tmp_path: Path) -> None:
    trained(tmp_path, {"every": 6, "start_scale": 1.0, "decay": 0.25}, STILL)
    old, new = (gather(small_model(), [Text().batch(step, Ranks())[0]]) for step in (5, 11))
    for name, hessian in kept(tmp_path).items():
        torch.testing.assert_close(hessian, 0.2 * old[name] + 0.8 * new[name], rtol=1e-4, atol=1e-6)


def test_training_is_not_changed_by_it(tmp_path: Path) -> None:
    looked_on = trained(tmp_path, {"every": 1, "start_scale": 1.0})
    alone = small_model()
    spec = TrainSpec(64, schedule=ScheduleSpec(steps=12, warmdown=4), warmup_steps=0)
    pretrain(alone, Text(), spec, Run(), choose("cpu"), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(looked_on.parameters(), alone.parameters(), strict=True))
    assert all(owner.observe is None for owner in projections(looked_on).values())


@pytest.mark.parametrize("stop_at", [2, 7, 11])
def test_killed_and_resumed_it_has_the_bits_of_one_never_interrupted(tmp_path: Path, stop_at: int) -> None:
    """Before the first gathering, between two, and before the last."""
    table: dict[str, object] = {"every": 3, "start_scale": 1.0, "decay": 0.9}
    trained(tmp_path / "whole", table)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "again", table, text=Text(stop_at))
    assert not (tmp_path / "again" / online.OBSERVED).exists()
    trained(tmp_path / "again", table)
    assert (tmp_path / "again" / online.OBSERVED).read_bytes() == (tmp_path / "whole" / online.OBSERVED).read_bytes()


def test_what_it_cost_is_booked_over_all_steps(tmp_path: Path) -> None:
    model, quant = small_model(), QuantSpec(calibration=online.Spec(every=2, start_scale=1.0))
    with Run(tmp_path) as run:
        observer = online.observer(quant, model, observed(model, quant), run)
        assert observer is not None
        for step in range(1, 6):
            observer.after_step(step, 1.0, Text().batch(step, Ranks())[0])
        observer.finish()
        fact = run.facts["online"]
    assert fact["gatherings"] == 2
    assert fact["milliseconds_per_step"] == pytest.approx(1000 * fact["seconds"] / 5, abs=0.11)
    assert fact["seconds"] > 0


NEVER = [{"every": 13, "start_scale": 1.0}, {"every": 1, "start_scale": 0.2}]


@pytest.mark.parametrize("table", NEVER)
def test_a_source_that_will_never_be_due_is_refused_before_training(tmp_path: Path, table: dict[str, object]) -> None:
    quant = build(QuantSpec, {"calibration": {"kind": "online", **table}})
    model, schedule = small_model(), ScheduleSpec(steps=12, warmdown=4)
    says = rf"quant\.calibration: no Hessian in 12 steps: every = {table['every']}, and rates below start_scale = "
    with Run(tmp_path) as run:
        observer = online.observer(quant, model, observed(model, quant), run)
        assert observer is not None
        with pytest.raises(RecipeError, match=says):
            observer.foresee(rate_scale(schedule, step, 0.0) for step in range(12))


@pytest.mark.parametrize("table", NEVER)
def test_where_a_clock_ended_before_any_was_due_the_last_batch_is_taken_and_said(
    tmp_path: Path, table: dict[str, object]
) -> None:
    model = trained(tmp_path, table, STILL)
    expected = gather(model, [Text().batch(11, Ranks())[0]])
    for name, hessian in kept(tmp_path).items():
        torch.testing.assert_close(hessian, expected[name], rtol=1e-4, atol=1e-6)
    journal = (tmp_path / "journal.jsonl").read_text()
    assert "no step was due; the last batch was taken" in journal


def test_without_any_batch_there_is_nothing_to_take(tmp_path: Path, model: GPT) -> None:
    quant = QuantSpec(calibration=online.Spec())
    with Run(tmp_path) as run:
        observer = online.observer(quant, model, observed(model, quant), run)
        assert observer is not None
        with pytest.raises(RecipeError, match="no Hessian in 0 steps"):
            observer.finish()
    assert not (tmp_path / online.OBSERVED).exists()


def test_hessians_that_are_gone_are_said_to_be(tmp_path: Path, model: GPT) -> None:
    quant = QuantSpec(calibration=online.Spec())
    with Run(tmp_path) as run, pytest.raises(RecipeError, match=r"observed\.safetensors: gathered while training"):
        online.hessians(quant, model, observed(model, quant), (), run, 0)
