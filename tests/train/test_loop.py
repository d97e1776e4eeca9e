"""The training loop: it learns, resumes bit for bit, accumulates exactly, stops on nonsense, and sees fake weights."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fairway.base.devices import choose
from fairway.base.errors import DataError, FairwayError, RecipeError
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.model import ModelSpec, build_model
from fairway.train import AverageSpec, ScheduleSpec, TrainSpec, pretrain
from fairway.train.loop import CHECKPOINT, OptimSpec
from fairway.train.optim import adamw
from tests.model.variants import BASE, VOCAB

CPU = choose("cpu")
SPEC = TrainSpec(
    batch_tokens=64,
    schedule=ScheduleSpec(steps=12, warmdown=4),
    average=AverageSpec("ema", decay=0.8),
    warmup_steps=0,
    checkpoint_seconds=0.0,
)


class Pattern:
    """Text with something to learn: the next token is the last plus one, now and then not."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.asked = stop_at, []

    def batch(self, step: int, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(step)
        chance = torch.Generator().manual_seed(step)
        starts = torch.randint(0, VOCAB, (4, 1), generator=chance)
        rows = (starts + torch.arange(17)) % VOCAB
        rows = rows[ranks.share(4)]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def model(seed: int = 0):
    return build_model(ModelSpec(**BASE), VOCAB, seed)


def weights(m) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in m.parameters()])


def test_the_loss_falls() -> None:
    m = model()
    trained = pretrain(m, Pattern(), replace(SPEC, schedule=ScheduleSpec(steps=60, warmdown=20)), Run(), CPU, seed=0)
    assert trained.steps == 60
    assert trained.tokens == 60 * 64
    assert trained.loss < 2.5 < 4.1


def test_training_twice_gives_the_same_bits() -> None:
    a, b = model(), model()
    for m in (a, b):
        pretrain(m, Pattern(), SPEC, Run(), CPU, seed=0)
    assert torch.equal(weights(a), weights(b))


def test_a_run_killed_and_resumed_ends_with_the_bits_of_one_never_interrupted(tmp_path: Path) -> None:
    whole = model()
    pretrain(whole, Pattern(), SPEC, Run(), CPU, seed=0)
    with Run(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        pretrain(model(), Pattern(stop_at=7), SPEC, run, CPU, seed=0)
    resumed, data, counted_from = model(seed=5), Pattern(), []

    class Shown(Run):
        def meter(self, label: str, total: float, unit: str, begun: float = 0.0):
            counted_from.append(begun)
            return super().meter(label, total, unit, begun)

    with Shown(tmp_path) as run:
        trained = pretrain(resumed, data, SPEC, run, CPU, seed=0)
    assert data.asked == [7, 8, 9, 10, 11]
    assert counted_from == [7], "the rate, and the time left, count what is done here"
    assert torch.equal(weights(whole), weights(resumed))
    assert trained.seconds > run.facts["resumed"]["seconds"] > 0


class Signalled(Pattern):
    """Sends this process a signal while step 7 is under way."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def batch(self, step: int, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 7:
            os.kill(os.getpid(), self.number)
        return super().batch(step, ranks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(tmp_path: Path, number: int) -> None:
    whole, resumed, before = model(), model(seed=5), signal.getsignal(number)
    pretrain(whole, Pattern(), SPEC, Run(), CPU, seed=0)
    with Run(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        pretrain(model(), Signalled(number), SPEC, run, CPU, seed=0)
    data = Pattern()
    with Run(tmp_path) as run:
        pretrain(resumed, data, SPEC, run, CPU, seed=0)
    assert data.asked[0] == 8
    assert torch.equal(weights(whole), weights(resumed))
    assert signal.getsignal(number) is before


def test_a_foreign_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with Run(tmp_path) as run, pytest.raises(DataError, match="not a checkpoint") as caught:
        pretrain(model(), Pattern(), SPEC, run, CPU, seed=0)
    assert "\n" not in str(caught.value)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    a, b = model().double(), model().double()
    pretrain(a, Pattern(), SPEC, Run(), CPU, seed=0)
    pretrain(b, Pattern(), replace(SPEC, micro_tokens=16), Run(), CPU, seed=0)
    torch.testing.assert_close(weights(a), weights(b), atol=1e-6, rtol=0)


def test_warmup_steps_leave_no_trace() -> None:
    a, b = model(), model()
    pretrain(a, Pattern(), SPEC, Run(), CPU, seed=0)
    pretrain(b, Pattern(), replace(SPEC, warmup_steps=3), Run(), CPU, seed=0)
    assert torch.equal(weights(a), weights(b))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(tmp_path: Path) -> None:
    wild = replace(SPEC, clip=0.0, optim=OptimSpec(table=adamw.Spec(lr=float("1e38"))))
    with Run(tmp_path) as run, pytest.raises(FairwayError, match=r"not finite at step \d+ .*checkpoint: none"):
        pretrain(model(), Pattern(), wild, run, CPU, seed=0)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_batch_that_is_no_multiple_of_the_context_is_refused_with_the_nearest_that_is() -> None:
    with pytest.raises(RecipeError, match=r"batch_tokens = 70 .*context = 16; try 64"):
        pretrain(model(), Pattern(), replace(SPEC, batch_tokens=70), Run(), CPU, seed=0)


class Switch:
    """A stand-in for quantisation-aware training: rounds every matrix coarsely once the rates fall."""

    def __init__(self, m) -> None:
        self.model, self.calls, self.seen = m, [], []

    def update(self, factor: float) -> bool:
        self.calls.append(factor)
        if factor >= 1 or self.seen:
            return False
        linear = self.model.blocks[0].mlp.up
        linear.fake_quant = lambda w: w + (self._round(w) - w).detach()
        return True

    def _round(self, w: torch.Tensor) -> torch.Tensor:
        rounded = (w * 4).round() / 4
        self.seen.append((rounded - w).abs().max().item())
        return rounded

    def remove(self) -> None:
        self.model.blocks[0].mlp.up.fake_quant = None


def test_fake_quantisation_reaches_the_forward_when_the_rates_fall_and_is_taken_off_after() -> None:
    m, untouched = model(), model()
    switch, run = Switch(m), Run()
    pretrain(m, Pattern(), SPEC, run, CPU, seed=0, fake_quant=switch)
    pretrain(untouched, Pattern(), SPEC, Run(), CPU, seed=0)
    assert switch.calls == [1.0] * 9 + [0.75, 0.5, 0.25]
    assert len(switch.seen) == 3
    assert min(switch.seen) > 0
    assert run.facts["fake_quant"]["step"] == 9
    assert not torch.equal(weights(m), weights(untouched))
    assert m.blocks[0].mlp.up.fake_quant is None


@pytest.mark.parametrize(("every", "taken"), [(1, 2), (2, 1), (50, 0)])
def test_the_journal_says_how_many_snapshots_were_averaged_and_that_there_was_none(every: int, taken: int) -> None:
    """Below 0.6 are the factors of steps 11 and 12, 0.5 and 0.25; every 50 steps is never in a run of 12."""
    run = Run()
    pretrain(model(), Pattern(), replace(SPEC, average=AverageSpec("swa", every=every, below=0.6)), run, CPU, seed=0)
    assert run.facts["average"] == {"kind": "swa", "taken": taken}
    assert (run.facts.get("substitution", {}).get("what") == "train.average") == (taken == 0)


def test_curves_of_loss_rate_and_norm_are_written(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        pretrain(model(), Pattern(), SPEC, run, CPU, seed=0)
    lines = (tmp_path / "curves.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert '"scale": 0.25' in lines[-1]


@pytest.mark.parametrize("clip", [0.3, 0.0])
def test_the_norm_is_that_of_the_gradient_before_it_is_clipped(tmp_path: Path, clip: float) -> None:
    with Run(tmp_path) as run:
        pretrain(model(), Pattern(), replace(SPEC, clip=clip), run, CPU, seed=0)
    first = json.loads((tmp_path / "curves.jsonl").read_text().splitlines()[0])
    m, (inputs, targets) = model(), Pattern().batch(0, Ranks())
    loss = torch.nn.functional.cross_entropy(m.logits(m(inputs)[0]).flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
    whole = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    assert first["norm"] == pytest.approx(float(whole.norm()), rel=1e-5)
    assert first["norm"] > 0.3
