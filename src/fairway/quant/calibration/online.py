"""Hessians gathered while training (#1251): once the rates fall, now and then one more eager forward, of the weights of
the moment on the step's own batch; what calibration would cost afterwards is spread over training.

H = Σ_g d^(G−g) H_g / Σ_g d^(G−g) over G gatherings, of which H_g is the mean over the inputs of *all* ranks (the source
used the first rank's alone, and drew further batches for it, so that training saw other ones). d = 1: the plain mean.
The forward is that of training: with quantisation-aware training under way, of weights on the grid.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairway.base.clock import Stopwatch
from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.model import GPT
from fairway.quant.observe import Hessians, gather, read_hessians, write_hessians

ON_CLOCK = False  # after training
OBSERVED = "observed.safetensors"


@dataclass(frozen=True)
class Spec:
    every: int = 25  # steps
    start_scale: float = 0.8  # begins once the factor on the rates is below it; 1: from the start
    decay: float = 1.0  # of what was gathered before, for each further gathering: the weights move

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every = {self.every}: at least 1 step is needed")
        for name in ("start_scale", "decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: a number in (0, 1] is needed")


class Observer:
    """Looks on while a model is trained.

    The sums are of all ranks, so that the first one's checkpoint holds them whole. `seconds` and `steps` outlive a
    checkpoint too: they say what a step costs more.
    """

    def __init__(self, quant: Any, model: GPT, names: Collection[str], run: Run) -> None:
        self.spec: Spec = quant.calibration
        self.batch, self.model, self.names, self.run = quant.calibration_batch, model, names, run
        self.sums: Hessians = {}
        self.last: Tensor | None = None  # inputs of the last step
        self.told = {"weight": 0.0, "gatherings": 0, "steps": 0, "seconds": 0.0}

    def foresee(self, scales: Iterable[float]) -> None:
        """scales: the factor on the rates of every step to come. RecipeError where none of them will be due."""
        due = [self._due(step, scale) for step, scale in enumerate(scales, 1)]
        if not any(due):
            raise self._never(len(due))

    def after_step(self, step: int, scale: float, inputs: Tensor) -> None:
        """step: how many were taken; scale: the factor on the last one's rates; inputs: (n, T), this rank's part."""
        self.told["steps"], self.last = step, inputs
        if self._due(step, scale):
            self._gather(inputs)

    def _due(self, step: int, scale: float) -> bool:
        return step % self.spec.every == 0 and (scale < self.spec.start_scale or self.spec.start_scale == 1)

    def _gather(self, inputs: Tensor) -> None:
        if self.model.embedding.weight.is_cuda:
            torch.cuda.synchronize()  # what the step itself still computes is none of our seconds
        with Stopwatch() as watch:
            quiet = Run(ranks=self.run.ranks)
            for name, hessian in gather(self.model, inputs.split(self.batch), self.names, quiet).items():
                self.sums[name] = hessian if name not in self.sums else self.spec.decay * self.sums[name] + hessian
        self.told["weight"] = self.spec.decay * self.told["weight"] + 1
        self.told["gatherings"] += 1
        self.told["seconds"] += watch.seconds

    def _never(self, steps: float) -> RecipeError:
        return RecipeError(
            f"quant.calibration: no Hessian in {steps} steps: every = {self.spec.every}, and rates below start_scale = "
            f"{self.spec.start_scale:g}, never meet; lower every, raise start_scale, or train longer"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.told = state["sums"], state["told"]

    def finish(self) -> None:
        """Writes the mean for `hessians`, and books `online`. A schedule by clock may have ended before any step was
        due: the last batch is taken then, and the journal says so. RecipeError where there is none either."""
        told = self.told
        if not self.sums and self.last is not None:
            self._gather(self.last)
            self.run.fact("substitution", what="quant.calibration", why="no step was due; the last batch was taken")
        if not self.sums:
            raise self._never(told["steps"])
        per_step = 1000 * told["seconds"] / told["steps"]
        facts = {"gatherings": told["gatherings"], "seconds": round(told["seconds"], 3)}
        self.run.fact("online", **facts, milliseconds_per_step=round(per_step, 3))
        if self.run.writes:
            write_hessians(self.run.path(OBSERVED), {name: total / told["weight"] for name, total in self.sums.items()})


def observer(quant: Any, model: GPT, names: Collection[str], run: Run) -> Observer | None:
    return Observer(quant, model, names, run) if names else None


def hessians(
    quant: Any, model: GPT, names: Collection[str], windows: Iterable[Tensor], run: Run, seed: int
) -> Hessians:
    """What training left in the run folder."""
    if not names:
        return {}
    path = run.path(OBSERVED)
    if not path.exists():
        raise RecipeError(f"{path}: gathered while training, and gone; start a new run")
    return read_hessians(path)
