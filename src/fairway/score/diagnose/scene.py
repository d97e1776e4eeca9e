"""What every procedure is given, and the shape that all of them have; the honest ones come first."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.artifact import Artifact
from fairway.base.devices import Device
from fairway.base.slots import kind_of
from fairway.data.tokenizer import Tokenizer
from fairway.model import GPT
from fairway.score.adapt import ttt
from fairway.score.evaluate import model_on, predictor_of, stream_of
from fairway.score.predictor import Block, Predictor
from fairway.score.spec import ScoreSpec, Stage
from fairway.score.stream import Index, Stream, Unit, Windows
from fairway.score.tape import Tape
from fairway.score.tellers import normalise
from fairway.score.windows import sliding

Nats = npt.NDArray[np.float64]
Payment = tuple[Index, Nats]
"""Positions (n,) and what a procedure says that they cost, in nats."""


@dataclass(frozen=True)
class Scene:
    """A run's model and how it reads; procedures copy the model before they change it.

    context: T, tokens of a window; windows: sliding ones, the run's own where it has them; adapt: the run's test-time
    training, or its usual form where the run has none.
    """

    model: GPT
    tokenizer: Tokenizer
    context: int
    windows: sliding.Spec
    adapt: ttt.Spec
    temperature: float
    block_tokens: int

    @classmethod
    def of(cls, artifact: Artifact, spec: ScoreSpec, device: Device | None = None) -> "Scene":
        """The scene of an opened file: one lane and no rolling, since the field's procedures know neither."""
        context = spec.context or artifact.model_spec.context
        windows = spec.windows if kind_of(spec.windows) == "sliding" else sliding.Spec(max(1, min(64, context // 4)))
        if 2 * windows.stride > context:  # without an overlap there are no tails to count twice
            windows = sliding.Spec(max(1, context // 4))
        usual = ttt.Spec(chunk=context, epochs=3, batch=1, lr=5e-4, params="all")  # pocket's
        adapt = spec.adapt if isinstance(spec.adapt, ttt.Spec) else usual
        model = model_on(artifact, device)
        return cls(model, artifact.tokenizer, context, windows, adapt, spec.temperature, spec.block_tokens)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocab(self) -> int:
        return self.model.vocab

    def learning(self, targets: int) -> ttt.Spec:
        """The test-time training in chunks so short that a text of `targets` targets has eight, each a context long
        at least, so that every chunk has windows of its own."""
        return replace(self.adapt, chunk=max(self.context, min(self.adapt.chunk, targets // 8)))

    def spec(self, targets: int, block_tokens: int = 0) -> ScoreSpec:
        return ScoreSpec(
            context=self.context,
            windows=self.windows,
            adapt=self.learning(targets),
            temperature=self.temperature,
            block_tokens=block_tokens or self.block_tokens,
        )

    def stream(self, targets: int, stage: Stage) -> Stream:
        return stream_of(stage, targets, self.spec(targets), self.context)


def stolen(tape: Tape) -> Tape:
    """A copy of a tape that is open to its end: what a cheat reads from when no harness keeps the text from it."""
    free = copy.copy(tape)
    free.open_to(free.edges[1:])
    return free


class Procedure:
    """A way to a number of bits per byte; a predictor as well, so that every instrument can be held to it.

    text: read by whatever means the procedure has (the harness's tape, or a stolen copy); block_tokens: tokens of a
    forward. `charges` says what it would charge for each token of the vocabulary, were that the true one: a
    distribution, where the procedure is honest. `earlier` holds what it charged for positions before its last word.
    """

    name: ClassVar[str]
    charge: ClassVar[str] = ""
    stage: ClassVar[Stage] = "sliding"  # the honest score of the same text that it is to be compared with
    flips: ClassVar[int] = 3  # single tokens that the probe changes

    def __init__(self, scene: Scene, text: Tape, stream: Stream, block_tokens: int) -> None:
        self.scene, self.text, self.stream, self.block_tokens = scene, text, stream, block_tokens
        self.model = copy.deepcopy(scene.model)
        self.earlier: list[Payment] = []
        self.inner = self.reader(self.model)

    def charges(self, unit: Unit) -> Iterator[Block]:
        """Positions (n,) and the logarithms of charges (n, vocab) float64."""
        yield from self.read(self.inner, unit)

    def predict(self, unit: Unit) -> Iterator[Block]:
        """What it hands to a harness; here the charges, as they are."""
        return self.charges(unit)

    def perceive(self, unit: Unit) -> None:
        self.inner.perceive(unit)

    def byte_lengths(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The bytes that it counts for each target of (N+1,) tokens."""
        return self.scene.tokenizer.byte_lengths(tokens[1:], tokens[:-1])

    def reader(self, model: GPT, adapt: ttt.Spec | None = None) -> Predictor:
        """An honest predictor of a model over this stream; it learns, score first, where `adapt` is given."""
        spec = self.scene.spec(self.stream.targets, self.block_tokens)
        if adapt is None:
            return predictor_of(model, self.text, self.stream, spec, "sliding")
        return predictor_of(model, self.text, self.stream, replace(spec, adapt=adapt), "adapted")

    def read(self, predictor: Predictor, unit: Unit) -> Iterator[Block]:
        """A predictor's log-probabilities, at the temperature of the run."""
        for positions, logits in predictor.predict(unit):
            yield positions, normalise(logits, self.scene.temperature)

    def targets(self, positions: Index) -> Tensor:
        """The true tokens of some positions, by the text: (n,) int64."""
        return self.text.read(positions + 1, 1)[:, 0]

    def paid(self, positions: Index, charges: Tensor) -> Payment:
        """What the true tokens are charged."""
        found = -charges.gather(1, self.targets(positions)[:, None])[:, 0]
        return positions, found.cpu().numpy()


class Plain(Procedure):
    """The honest score in windows that do not overlap."""

    name, stage = "plain", "quantized"


class Sliding(Procedure):
    """The honest score in sliding windows."""

    name = "sliding"


class Adapted(Procedure):
    """The honest adapted score: every chunk is scored first, and learned from after."""

    name, stage = "adapted", "adapted"

    def __init__(self, scene: Scene, text: Tape, stream: Stream, block_tokens: int) -> None:
        super().__init__(scene, text, stream, block_tokens)
        self.inner = self.reader(self.model, scene.learning(stream.targets))


HONEST: tuple[type[Procedure], ...] = (Plain, Sliding, Adapted)


@dataclass(frozen=True, eq=False)
class Claim:
    """What a procedure says of a text: never a score, since no ledger has seen it.

    payments: all that it charged, in order; bits: of its last word; bytes: that it divides by; excess: by how much its
    charges over the whole vocabulary miss a sum of 1, at worst.
    """

    payments: tuple[Payment, ...]
    bits: float
    bytes: int
    excess: float

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


@torch.no_grad()
def claim(kind: type[Procedure], scene: Scene, tokens: npt.NDArray[Any]) -> Claim:
    """Lets a procedure do its work on (N+1,) tokens that it may read as it likes; sums in float64."""
    stream = scene.stream(len(tokens) - 1, kind.stage)
    procedure = kind(scene, stolen(Tape(tokens, scene.device)), stream, scene.block_tokens)
    last, excess = list[Payment](), 0.0
    for unit in stream:
        for positions, charges in procedure.charges(unit):
            last.append(procedure.paid(positions, charges))
            excess = max(excess, float((charges.exp().sum(dim=1) - 1).abs().max()))
        procedure.perceive(unit)
    nats = float(sum(prices.sum() for _, prices in last))
    lengths = procedure.byte_lengths(tokens)
    counted = int(sum(lengths[positions].sum() for positions, _ in last))
    return Claim((*procedure.earlier, *last), nats / math.log(2), counted, excess)


def windows_of(start: Index, stop: Index, first: Index) -> Windows:
    """Windows of one lane."""
    zero = np.zeros(len(start), np.int64)
    return Windows(start, stop, first, zero, zero)
