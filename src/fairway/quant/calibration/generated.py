"""Text that the model writes itself (#1019, #1234): no training data is read, so it may happen outside the training
clock. Published: +0.0003 bpb against real data, 0.002 for random tokens; 186 to 198 s on one GPU without a cache.

A sequence begins with a token drawn uniformly from the whole vocabulary, BOS among them, as the source does; every
further one is drawn from softmax(logits / temperature) given all before it, with the key/value cache. A BOS on the way
begins the next document, as in a window of training text. Every sequence has random numbers of its own, by its number
over all ranks: ranks write different text, and any number of ranks the same in all (every rank of the source wrote the
same).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairway.base.clock import Stopwatch
from fairway.base.devices import generator
from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.model import GPT
from fairway.quant.observe import Hessians, gather

ON_CLOCK = False


@dataclass(frozen=True)
class Spec:
    sequences: int = 64  # over all ranks
    tokens: int = 2048  # of a sequence, at most the model's context
    temperature: float = 0.8

    def __post_init__(self) -> None:
        for name in ("sequences", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: a positive number is needed")


def observer(quant: Any, model: GPT, names: Collection[str], run: Run) -> None:
    """Nothing is gathered while training. RecipeError for sequences beyond the context."""
    if names and quant.calibration.tokens > model.spec.context:
        raise RecipeError(
            f"quant.calibration.tokens = {quant.calibration.tokens}: the model has learned no position beyond "
            f"model.context = {model.spec.context}; write at most as many"
        )


def hessians(
    quant: Any, model: GPT, names: Collection[str], windows: Iterable[Tensor], run: Run, seed: int
) -> Hessians:
    """Books `generated`: the seconds of it all and of writing alone, and how much was written over all ranks."""
    if not names:
        return {}
    spec: Spec = quant.calibration
    with Stopwatch() as whole:
        with Stopwatch() as writing:
            written = write(model, spec, quant.calibration_batch, seed, run)
        found = gather(model, written, names, run, spec.sequences)
    seconds = {"seconds": round(whole.seconds, 3), "writing_seconds": round(writing.seconds, 3)}
    run.fact("generated", **seconds, sequences=spec.sequences, tokens=spec.sequences * spec.tokens)
    return found


@torch.no_grad()
def write(model: GPT, spec: Spec, batch: int, seed: int, run: Run) -> list[Tensor]:
    """This rank's share of the sequences, (at most `batch`, tokens) int64 each."""
    numbers = range(spec.sequences)[run.ranks.share(spec.sequences)]
    where, written = model.embedding.weight.device, []
    with run.meter("write text", max(len(numbers), 1) * spec.tokens, "tokens") as meter:
        for first in range(0, len(numbers), batch):
            lot = numbers[first : first + batch]
            chances = [
                torch.rand(spec.tokens, generator=generator(seed, f"calibration/{number}"), dtype=torch.float64)
                for number in lot
            ]
            chance = torch.stack(chances).to(where)
            tokens = torch.empty(chance.shape, dtype=torch.int64, device=where)
            tokens[:, 0] = (chance[:, 0] * model.vocab).long()
            past = model.begin(len(lot), spec.tokens, spec.tokens)
            for at in range(1, spec.tokens):
                hidden, past = model(tokens[:, at - 1 : at], past)
                tokens[:, at] = draw(model.logits(hidden)[:, 0], spec.temperature, chance[:, at])
                meter.update(first * spec.tokens + len(lot) * (at + 1))
            written.append(tokens)
    return written


def draw(logits: Tensor, temperature: float, chance: Tensor) -> Tensor:
    """The token whose share of softmax(logits / temperature), the shares laid end to end, holds `chance` of the whole.

    logits: (B, vocab); chance: (B,) float64, uniform in [0, 1) -> (B,) int64.
    """
    ends = torch.softmax(logits.double() / temperature, dim=1).cumsum(dim=1)
    found = torch.searchsorted(ends, chance[:, None] * ends[:, -1:], right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1)  # where rounding brings chance · sum up to the sum
