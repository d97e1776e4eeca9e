"""The training loop: batches -> gradients, averaged over ranks and micro-batches -> steps -> averaged weights."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fairway.base import slots
from fairway.base.clock import Stopwatch
from fairway.base.devices import Device, generator
from fairway.base.errors import FairwayError, RecipeError
from fairway.base.journal import Run
from fairway.base.progress import Meter
from fairway.base.ranks import Ranks
from fairway.base.specs import choice
from fairway.model import GPT, tags
from fairway.train import checkpoints
from fairway.train.averaging import Average, AverageSpec
from fairway.train.schedule import ScheduleSpec, done, progress, rate_scale

CHECKPOINT = "checkpoint.pt"
CHECK_EVERY = 20  # steps between looks at the loss on CUDA, where each look waits for the device


@dataclass(frozen=True)
class OptimSpec:
    """One technique for each role of parameters (gains and scalars share one)."""

    matrix: Any = choice("fairway.train.optim", "muon")
    table: Any = choice("fairway.train.optim", {"kind": "adamw", "lr": 0.035})
    gain: Any = choice("fairway.train.optim", "adamw")


@dataclass(frozen=True)
class TrainSpec:
    batch_tokens: int = 786_432  # a step's, over all ranks
    micro_tokens: int = 0  # a forward's, on one rank; 0: the rank's whole share at once
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    objective: Any = choice("fairway.train.objective", "cross_entropy")
    clip: float = 0.3  # global norm of the averaged gradient; 0: none
    average: AverageSpec = field(default_factory=AverageSpec)
    warmup_steps: int = 20  # real steps on random tokens before the clock starts; all state is restored after
    checkpoint_seconds: float = 60.0  # between checkpoints; 0: only when interrupted

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens = {self.batch_tokens}: at least one window is needed")


class Batches(Protocol):
    """What training needs of the data: a global batch for every step, of which a rank takes its part."""

    def batch(self, step: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """inputs and targets, (n, context) int64 each: this rank's part."""
        ...


class FakeQuant(Protocol):
    """Quantisation-aware training, handed over by the pipeline."""

    def update(self, factor: float) -> bool:
        """Told the factor on the rates before every step; answers whether plugs changed: the graph is compiled anew."""
        ...

    def remove(self) -> None:
        """Takes the plugs off."""
        ...


class Observer(Protocol):
    """What looks on, handed over by the pipeline: Hessians gathered while training. Its seconds are training's."""

    def after_step(self, step: int, scale: float, inputs: Tensor) -> None:
        """Told after every step how many were taken, the factor on its rates, and this rank's part of its batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, which the first rank writes for all: it must be the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Trained:
    """What training did."""

    steps: int
    tokens: int
    seconds: float
    loss: float | None  # the objective's nats per token, mean over the last steps; None: it was never looked at


def pretrain(
    model: GPT,
    batches: Batches,
    spec: TrainSpec,
    run: Run,
    device: Device,
    seed: int,
    fake_quant: FakeQuant | None = None,
    observer: Observer | None = None,
) -> Trained:
    """Trains `model` in place and leaves its averaged weights in it.

    Resumes from the run folder's checkpoint where there is one. A loss that is not finite raises FairwayError with the
    step and the last good checkpoint; Ctrl-C writes a checkpoint first.
    """
    trainer = _Trainer(model, spec, run, device, fake_quant, observer)
    clock = Stopwatch(trainer.resume())
    if trainer.step == 0:
        trainer.warm_up(spec.warmup_steps, batches, seed)
    try:
        with clock, _interrupts_wait(trainer):
            trainer.train(batches, clock)
    except KeyboardInterrupt:
        if not trainer.torn:
            trainer.save(clock.seconds)
        place = f" --resume {run.folder}" if run.folder else ""
        run.say(f"interrupted at step {trainer.step}; go on with: fairway run{place}")
        raise
    averaged = trainer.average.replace()
    run.fact("average", kind=spec.average.kind, taken=trainer.average.count)
    if spec.average.kind != "none" and not averaged:
        run.fact("substitution", what="train.average", why="no snapshot was due; the last weights are used")
    if fake_quant is not None:
        fake_quant.remove()
    return Trained(trainer.step, trainer.step * spec.batch_tokens, clock.seconds, trainer.recent_loss)


@contextmanager
def _interrupts_wait(trainer: "_Trainer") -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the step, where a checkpoint is whole; a second one does not wait, and
    writes none: half of the parameters may have moved."""

    def handler(number: int, frame: object) -> None:
        if trainer.stop:
            trainer.torn = True
            raise KeyboardInterrupt
        trainer.stop = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _Trainer:
    """The state between two steps."""

    def __init__(
        self,
        model: GPT,
        spec: TrainSpec,
        run: Run,
        device: Device,
        fake_quant: FakeQuant | None,
        observer: Observer | None,
    ) -> None:
        context = model.spec.context
        if spec.batch_tokens % context:
            raise RecipeError(
                f"train.batch_tokens = {spec.batch_tokens} is no multiple of model.context = {context}; "
                f"try {max(spec.batch_tokens // context, 1) * context}"
            )
        self.model, self.spec, self.run, self.device = model, spec, run, device
        self.fake_quant, self.observer = fake_quant, observer
        self.parameters = list(model.parameters())
        self.average = Average(spec.average, model)
        self.optimizers = self._build_optimizers()
        self.loss_sum = self._compiled()
        self.step = 0
        self.recent_loss: float | None = None
        self._bad = torch.zeros((), dtype=torch.bool, device=device.torch)
        self._saved: int | None = None
        self.stop = self.torn = False  # asked to stop; interrupted in the middle of a step

    def resume(self) -> float:
        """Takes up the checkpoint of the run folder, if any; the seconds already spent."""
        if self.run.folder is None or not (path := self.run.path(CHECKPOINT)).exists():
            return 0.0
        state = checkpoints.load(path, self.device.torch)
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.average.load_state_dict(state["average"])
        if self.observer:
            self.observer.load_state_dict(state["observer"])
        self.step, self._saved = state["step"], state["step"]
        self.run.fact("resumed", step=self.step, seconds=state["seconds"])
        self.run.say(f"resumed at step {self.step}, {state['seconds']:.1f} s of training already spent")
        return float(state["seconds"])

    def save(self, seconds: float) -> None:
        """Writes a checkpoint; never one of weights that are not finite, and none over the last good one. All ranks
        come here at the same step: a state may be gathered from all of them."""
        if self.run.folder is None or self._saved == self.step or self.run.ranks.max(float(self._bad)) > 0:
            return
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):
            return
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if self.run.writes:
            state = {
                "model": self.model.state_dict(),
                "optimizers": optimizers,
                "average": self.average.state_dict(),
                "observer": self.observer and self.observer.state_dict(),
                "step": self.step,
                "seconds": seconds,
            }
            checkpoints.save(self.run.path(CHECKPOINT), state)
        self._saved = self.step

    def warm_up(self, steps: int, batches: Batches, seed: int) -> None:
        """Real steps on random tokens, so that every path is compiled before the clock starts; then all is restored."""
        if steps == 0:
            return
        kept = [parameter.detach().clone() for parameter in self.parameters]
        inputs, _ = batches.batch(0, self.run.ranks)
        chance = generator(seed, f"warmup/{self.run.ranks.rank}")
        for _ in range(steps):
            tokens = torch.randint(0, self.model.vocab, inputs.shape, generator=chance)
            self.take_step(tokens, tokens, scale=1.0)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.copy_(value)
        self.optimizers = self._build_optimizers()
        self.average = Average(self.spec.average, self.model)
        self._bad.zero_()

    def train(self, batches: Batches, clock: Stopwatch) -> None:
        spec, schedule = self.spec, self.spec.schedule
        by_clock = schedule.by == "clock"
        unit, total = ("s", schedule.seconds) if by_clock else ("steps", schedule.steps)
        begun = clock.seconds if by_clock else self.step
        last_save = time.monotonic()
        with self.run.meter("train", total, unit, begun) as meter:
            while True:
                due = 0 < spec.checkpoint_seconds < time.monotonic() - last_save
                wish = self.run.ranks.max(2.0 * self.stop + due)  # on all ranks at the same step
                if wish == 1:
                    self.save(clock.seconds)
                    last_save = time.monotonic()
                elapsed = self._shared_seconds(clock)
                if done(schedule, self.step, elapsed):
                    break
                if wish > 1:
                    raise KeyboardInterrupt
                scale = rate_scale(schedule, self.step, elapsed)
                if self.fake_quant is not None and self.fake_quant.update(scale):
                    self.loss_sum = self._compiled()
                    self.run.fact("fake_quant", step=self.step, scale=scale)
                inputs, targets = batches.batch(self.step, self.run.ranks)
                loss = self.take_step(inputs, targets, scale)
                self.step += 1
                self.average.update(self.step, scale)
                if self.observer:
                    self.observer.after_step(self.step, scale, inputs)
                self._look(loss, scale, clock, meter)
        self._refuse_non_finite()
        self.save(clock.seconds)

    def take_step(self, inputs: Tensor, targets: Tensor, scale: float) -> Tensor:
        """One optimiser step on this rank's part of the batch; the batch's mean loss, not yet summed over ranks."""
        target = self.device.torch
        context = inputs.shape[1]
        rows = max(self.spec.micro_tokens // context, 1) if self.spec.micro_tokens else len(inputs)
        total = torch.zeros((), device=target)
        for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
            loss = self.loss_sum(x.to(target, non_blocking=True), y.to(target, non_blocking=True))
            loss = loss / self.spec.batch_tokens
            loss.backward()
            total += loss.detach()
        if any(hasattr(optimizer, "reduce") for optimizer in self.optimizers.values()):
            owned = slots.optional("fairway.train.owned")
            self.norm = owned.reduce(self.optimizers.values(), self.parameters, self.run.ranks, self.spec.clip)
        else:
            self.run.ranks.sum_gradients(self.parameters)
            self.norm = torch.nn.utils.clip_grad_norm_(
                self.parameters, self.spec.clip or float("inf")
            )  # inf: times 1.0
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = getattr(self.spec.optim, name).lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    def _build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        found = tags(self.model)
        groups: dict[str, list[torch.nn.Parameter]] = {"matrix": [], "table": [], "gain": []}
        for name, parameter in self.model.named_parameters():
            role = found[name].role
            groups["gain" if role == "scalar" else role].append(parameter)
        return {
            role: slots.module_of(chosen).build(chosen, parameters, self.run.ranks)
            for role, parameters in groups.items()
            if parameters
            for chosen in (getattr(self.spec.optim, role),)
        }

    def _compiled(self) -> Callable[[Tensor, Tensor], Tensor]:
        model, objective, chosen = self.model, slots.module_of(self.spec.objective), self.spec.objective

        def loss_sum(inputs: Tensor, targets: Tensor) -> Tensor:
            logits = model.logits(model(inputs)[0])
            loss: Tensor = objective.loss(chosen, logits.flatten(0, 1), targets.flatten())
            return loss.sum()

        return torch.compile(loss_sum, fullgraph=True, dynamic=False) if self.device.compile else loss_sum

    def _look(self, loss: Tensor, scale: float, clock: Stopwatch, meter: Meter) -> None:
        """Watches the loss; on CUDA only now and then, since each look waits for the device."""
        self._bad |= ~torch.isfinite(loss)
        if self.device.torch.type == "cuda" and self.step % CHECK_EVERY:
            return
        self._refuse_non_finite()
        value = float(self.run.ranks.sum_(loss.clone()))
        self.recent_loss = value if self.recent_loss is None else 0.9 * self.recent_loss + 0.1 * value
        seconds = clock.seconds
        rate = self.step * self.spec.batch_tokens / max(seconds, 1e-9)
        self.run.point("train", self.step, loss=value, scale=scale, norm=float(self.norm), seconds=seconds)
        schedule = self.spec.schedule
        whole = schedule.seconds if schedule.by == "clock" else schedule.steps
        meter.update(progress(schedule, self.step, seconds) * whole, loss=self.recent_loss, tokens_per_s=rate)

    def _refuse_non_finite(self) -> None:
        if self.run.ranks.max(float(self._bad)) > 0:
            good = f"step {self._saved} in {self.run.folder}" if self._saved is not None else "none"
            raise FairwayError(
                f"train: the loss is not finite at step {self.step} (last good checkpoint: {good}); "
                "lower train.optim.*.lr or train.clip"
            )

    def _shared_seconds(self, clock: Stopwatch) -> float:
        """The clock that every rank goes by: a schedule by clock must fall and end at the same step everywhere."""
        if self.spec.schedule.by == "steps":
            return clock.seconds
        if self.device.torch.type == "cuda":
            torch.cuda.synchronize()  # else the host runs ahead, by up to CHECK_EVERY steps past the end
        return self.run.ranks.max(clock.seconds)
