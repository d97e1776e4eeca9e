"""Score-first test-time training in chunks (#461, #549, #1004).

Chunk c covers the targets [cK, (c+1)K). All its windows are scored first; then, unless it is the last, the model is
trained on it for E epochs, cut into non-overlapping sequences of T tokens. One optimiser for the whole run, weights
are never reset, lr_c = lr · ½ (1 + cos(π c / (C−1))) over the C chunks, mean cross-entropy over tokens.

Gain: 0.0064 to 0.0069 bits per byte with AdamW 1e-4 on the last 2 blocks and all scales (#1004), 0.0025 with SGD 0.002
on all weights (#549). AdamW on *all* quantised weights diverges (+0.03 to +0.08: #601, #693). On full-GPTQ int6 stacks
nothing was gained (#756, #1060).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.base.errors import RecipeError
from fairway.base.ranks import Ranks
from fairway.model import tags
from fairway.score.predictor import Adapter as Base
from fairway.score.predictor import Network
from fairway.score.stream import Unit, Windows
from fairway.score.tape import Tape


@dataclass(frozen=True)
class Spec:
    """The reference's values (B6)."""

    chunk: int = 131072  # K, targets between two updates
    epochs: int = 3  # passes over each paid chunk
    batch: int = 64  # sequences of an optimiser step, over all ranks
    micro_batch: int = 32  # sequences of a forward on one rank: memory only, never the result
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-4  # per step, at the first chunk
    schedule: Literal["cosine", "constant"] = "cosine"  # over chunks
    betas: tuple[float, float] = (0.9, 0.999)  # adamw
    eps: float = 1e-8  # adamw
    momentum: float = 0.9  # sgd
    weight_decay: float = 0.0  # decoupled with adamw
    clip: float = 1.0  # norm of the whole gradient; 0: none
    params: Literal["last_blocks", "all"] = "last_blocks"  # last_blocks: those whole, and every scale
    last_blocks: int = 2

    def __post_init__(self) -> None:
        for name in ("chunk", "epochs", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        for name in ("lr", "clip", "weight_decay", "last_blocks", "eps", "momentum"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: 0 or more is needed")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {self.betas}: two numbers from 0 to below 1 are needed")


def learning_rate(spec: Spec, chunk: int, chunks: int) -> float:
    """lr · ½ (1 + cos(π c / (C−1))); c: `chunk`, C: `chunks`."""
    if spec.schedule == "constant" or chunks < 2:
        return spec.lr
    return spec.lr * 0.5 * (1 + math.cos(math.pi * chunk / (chunks - 1)))


def chosen(model: nn.Module, params: str, last_blocks: int) -> list[nn.Parameter]:
    """The parameters that learn: all, or the last blocks whole and every scale (of attention, MLP, features)."""
    if params == "all":
        return list(model.parameters())
    by_name = tags(model)
    layers = 1 + max((tag.layer for tag in by_name.values() if tag.layer is not None), default=-1)
    named = dict(model.named_parameters())
    return [
        named[name]
        for name, tag in by_name.items()
        if (tag.layer is not None and tag.layer >= layers - last_blocks) or tag.part.endswith("scale")
    ]


def cross_entropy_sum(model: Network, inputs: Tensor, targets: Tensor) -> Tensor:
    """Σ −ln p(target), in nats; inputs, targets: (n, T) int64."""
    hidden, _ = model(inputs)
    logits = model.logits(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum")


_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # of AdamW and SGD


class Adapter(Base):
    """Trains the model on what is paid."""

    def __init__(self, model: Network, spec: Spec, chunks: int, ranks: Ranks) -> None:
        assert isinstance(model, nn.Module)
        self.model, self.spec, self.chunks, self.ranks = model, spec, chunks, ranks
        self.learned = chosen(model, spec.params, spec.last_blocks)
        if not self.learned:
            raise RecipeError(f"score.adapt: params = {spec.params!r} chooses no parameter of this model")
        ids = {id(parameter) for parameter in self.learned}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in ids)
            # Always a gradient, if need be zero: a parameter without one would decay on some numbers of ranks only.
            parameter.grad = torch.zeros_like(parameter) if id(parameter) in ids else None
        self.optimizer = _optimizer(self.learned, spec)
        self.steps = 0

    def learn(self, unit: Unit, tape: Tape) -> None:
        """E epochs on the unit's training sequences; every rank takes every step."""
        if unit.update is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, unit.index, self.chunks)
        for _ in range(self.spec.epochs):
            for begin in range(0, len(unit.update), self.spec.batch):
                self._step(unit.update[begin : begin + self.spec.batch], tape)

    def state(self) -> dict[str, Tensor]:
        """The weights that learn, and each one's moments."""
        found = {}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter in self.learned:
            found[f"weight.{names[id(parameter)]}"] = parameter.detach()
            moments = self.optimizer.state.get(parameter, {})
            for key in _MOMENTS:
                if isinstance(moments.get(key), Tensor):
                    found[f"{key}.{names[id(parameter)]}"] = moments[key]
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state. RecipeError where it is another model's."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        with torch.no_grad():
            for parameter in self.learned:
                name = names[id(parameter)]
                if f"weight.{name}" not in state or state[f"weight.{name}"].shape != parameter.shape:
                    raise RecipeError(
                        f"state: no weight {name} of shape {list(parameter.shape)}; it is another model's"
                    )
                parameter.copy_(state[f"weight.{name}"])
                moments = {key: f"{key}.{name}" for key in _MOMENTS if f"{key}.{name}" in state}
                self.optimizer.state[parameter] = {key: state[place].clone() for key, place in moments.items()}

    def _step(self, batch: Windows, tape: Tape) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        tokens = batch.scored  # of the global batch: so each token weighs the same, however the batch is split
        with torch.enable_grad():
            for run in batch[self.ranks.share(len(batch))].runs():
                for begin in range(0, len(run), self.spec.micro_batch):
                    part = run[begin : begin + self.spec.micro_batch]
                    loss = cross_entropy_sum(self.model, tape.inputs(part), tape.targets(part)) / tokens
                    loss.backward()
        self.ranks.sum_gradients(self.learned)
        if self.spec.clip:
            torch.nn.utils.clip_grad_norm_(self.learned, self.spec.clip)
        self.optimizer.step()
        self.steps += 1


def _optimizer(parameters: list[nn.Parameter], spec: Spec) -> torch.optim.Optimizer:
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, spec.lr, spec.momentum, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(parameters, spec.lr, spec.betas, spec.eps, spec.weight_decay)
