"""Probe: change the text, and see which distributions move.

A distribution at target i may depend on tokens 0..i alone. The probe scores a short text through the same harness,
again and again: with single tokens changed, with the whole future changed, with other batch sizes, on two ranks.
Nothing that is coded up to the change may move: exactly 0 in equal shapes on a CPU, at most 1e-3 nats across batch
sizes, ranks and on GPUs. Each distribution must sum to 1, and predicting must leave the model's state as it was.

It finds what types cannot forbid: a window that peeks at its own targets, training before scoring, a correction shared
by a batch (SLOT: one flipped target moved 240 of 240 other scores, #1240). It samples, so it can refute, not prove.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.artifact import Artifact, open_artifact
from fairway.base.devices import Device
from fairway.base.journal import Run
from fairway.base.ranks import Ranks, in_threads
from fairway.data import Tokens
from fairway.score.evaluate import byte_lengths, is_exact, model_on, predictor_of, stream_of, teller_of
from fairway.score.harness import drive
from fairway.score.ledger import Ledger
from fairway.score.predictor import Adapter, Block, Predictor
from fairway.score.spec import ScoreSpec, Stage
from fairway.score.state import state_hash, tensors_hash
from fairway.score.stream import Index, Stream, Unit
from fairway.score.tape import Tape
from fairway.score.tellers import Listener, Softmax, Teller

Maker = Callable[[Tape, Stream, int], Predictor]
"""(tape, stream, block tokens) -> a fresh predictor: every call must begin from the same state."""

RankedMaker = Callable[[Tape, Stream, int, Ranks], Predictor]
"""The same, on one of several ranks."""

# Equal shapes on a CPU repeat bit for bit; across shapes float32 and bf16 sums are ordered differently.
ACROSS_SHAPES = 1e-3  # nats
UNNORMALISED = 1e-9


@dataclass(frozen=True)
class Finding:
    """One check: the worst movement measured against what is allowed."""

    check: str  # "flip", "future", "batch", "ranks", "normalised", "state", "repeat"
    worst: float  # nats moved; |sum − 1| for "normalised"; units that changed the state for "state"
    allowed: float
    position: int | None = None  # where the worst was seen
    changed: int | None = None  # the token that was changed

    @property
    def honest(self) -> bool:
        return self.worst <= self.allowed


@dataclass(frozen=True)
class Report:
    """What the probe saw of one stage; honest when every finding is."""

    stage: str
    targets: int
    units: int
    chunk: int  # targets between two updates; 0: nothing is learned
    findings: tuple[Finding, ...] = field(default_factory=tuple)

    @property
    def honest(self) -> bool:
        return all(finding.honest for finding in self.findings)

    @property
    def worst(self) -> Finding:
        """The finding that is farthest over (or nearest to) what is allowed."""
        return max(self.findings, key=lambda finding: (not finding.honest, finding.worst - finding.allowed))


def examine(
    make: Maker,
    stream: Callable[[int], Stream],
    tokens: npt.NDArray[Any],
    vocab: int,
    stage: str = "",
    flips: int = 8,
    block_tokens: int = 32768,
    exact: bool = True,
    teller: Callable[[Listener], Teller] = lambda listen: Softmax(1.0, listen),
    seed: int = 0,
    device: torch.device | str = "cpu",
    model: Callable[[Predictor], torch.nn.Module | None] = lambda predictor: getattr(predictor, "model", None),
    ranked: RankedMaker | None = None,
) -> Report:
    """Probes a predictor on a short text (a few chunks; V·N float64 numbers are held twice).

    make: builds a fresh predictor; stream: its order for a number of targets; exact: equal shapes must repeat bit for
    bit (CPU); teller: makes distributions of logits; model: where the predictor keeps the state that predicting must
    not change; ranked: builds a rank's predictor, where the number of ranks is to be probed too.
    """
    random = np.random.default_rng(seed)
    order = stream(len(tokens) - 1)
    still = 0.0 if exact else ACROSS_SHAPES
    look = _Look(stream, vocab, teller, device, model)

    def distributions(text: npt.NDArray[Any], block: int = block_tokens) -> Tensor:
        return look.distributions(make, text, block)

    base = distributions(tokens)
    findings = [
        Finding("normalised", *_worst((base.exp().sum(dim=1) - 1).abs(), UNNORMALISED)),
        Finding("state", float(look.changed), 0.0),
        Finding("repeat", *_worst(_moved(base, distributions(tokens)), still)),
        Finding("batch", *_worst(_moved(base, distributions(tokens, 1)), ACROSS_SHAPES)),
    ]
    if ranked is not None:
        findings.append(Finding("ranks", *_worst(_moved(base, look.on_ranks(ranked, tokens, 1)), ACROSS_SHAPES)))
    turn = np.empty(order.targets, np.int64)
    turn[order.order] = np.arange(order.targets)
    for token in _places(order, flips, random):
        other = tokens.copy()
        other[token] = (int(other[token]) + random.integers(1, vocab)) % vocab
        findings.append(_before(base, distributions(other), turn, "flip", token, still))
    for token in _spread(order.targets, max(2, flips // 3), random):
        other, later = tokens.copy(), 1 + np.flatnonzero(turn >= turn[token - 1])
        other[later] = random.integers(0, vocab, len(later))
        findings.append(_before(base, distributions(other), turn, "future", token, still))
    return Report(stage, order.targets, len(order), order.chunk, tuple(findings))


def probe(
    path: Path,
    held_out: Tokens,
    spec: ScoreSpec,
    run: Run,
    stages: tuple[Stage, ...] = (),
    device: Device | None = None,
    targets: int = 0,
    flips: int = 8,
    seed: int = 0,
) -> tuple[Report, ...]:
    """Probes the stages of a file on the beginning of a text; by default the sliding stage, and the adapted one where
    the spec adapts.

    targets: how many are scored, 0: three and a half contexts. Where that is less than three chunks of the adaptation,
    the probe learns in shorter chunks (the report says how long), so that there is learning to look at.
    """
    artifact = open_artifact(path)
    byte_lengths(artifact, held_out)
    context = spec.context or artifact.model_spec.context
    tokens = np.array(held_out.tokens[: (targets or 7 * context // 2) + 1])
    reports = []
    for stage in stages or spec.stages[2:]:
        probed = _shortened(spec, len(tokens) - 1) if stage == "adapted" else spec
        reports.append(_probe_stage(artifact, tokens, probed, stage, context, flips, seed, device))
        found = reports[-1]
        run.fact(f"probe_{stage}", honest=found.honest, worst=asdict(found.worst), **_shape(found))
    return tuple(reports)


def _probe_stage(
    artifact: Artifact,
    tokens: npt.NDArray[Any],
    spec: ScoreSpec,
    stage: Stage,
    context: int,
    flips: int,
    seed: int,
    device: Device | None,
) -> Report:
    model = model_on(artifact, device, is_exact(spec, stage))
    where = next(model.parameters()).device

    def ranked(tape: Tape, stream: Stream, block: int, ranks: Ranks) -> Predictor:
        return predictor_of(copy.deepcopy(model), tape, stream, replace(spec, block_tokens=block), stage, ranks)

    return examine(
        make=lambda tape, stream, block: ranked(tape, stream, block, Ranks()),
        stream=lambda count: stream_of(stage, count, spec, context),
        tokens=tokens,
        vocab=artifact.vocab,
        stage=stage,
        flips=flips,
        block_tokens=spec.block_tokens,
        exact=where.type == "cpu",
        teller=lambda listen: teller_of(spec, stage, listen),
        seed=seed,
        device=where,
        ranked=ranked,
    )


class _Watched:
    """A predictor whose state is hashed around each `predict`."""

    def __init__(self, inner: Predictor, model: torch.nn.Module | None) -> None:
        self.inner, self.model, self.changed = inner, model, 0

    def predict(self, unit: Unit) -> Iterator[Block]:
        before = self._state()
        yield from self.inner.predict(unit)
        self.changed += self._state() != before

    def perceive(self, unit: Unit) -> None:
        self.inner.perceive(unit)

    def _state(self) -> tuple[str, str]:
        """Of the model, and of what else has been learned: the optimiser's moments."""
        adapter = getattr(self.inner, "adapter", None)
        learned = tensors_hash(adapter.state()) if isinstance(adapter, Adapter) else ""
        return state_hash(self.model) if self.model is not None else "", learned


class _Look:
    """Scores a text again and again, and keeps every distribution: (N, vocab) float64 log-probabilities."""

    def __init__(
        self,
        stream: Callable[[int], Stream],
        vocab: int,
        teller: Callable[[Listener], Teller],
        device: torch.device | str,
        model: Callable[[Predictor], torch.nn.Module | None],
    ) -> None:
        self.stream, self.vocab, self.teller, self.device, self.model = stream, vocab, teller, device, model
        self.changed = 0  # units that changed the state while they were predicted, last time

    def distributions(self, make: Maker, tokens: npt.NDArray[Any], block: int) -> Tensor:
        kept = self._room(tokens)
        self._score(lambda tape, stream, _: make(tape, stream, block), tokens, Ranks(), kept)
        return kept

    def on_ranks(self, make: RankedMaker, tokens: npt.NDArray[Any], block: int, world: int = 2) -> Tensor:
        """On several ranks, each in a thread of its own."""
        kept = self._room(tokens)
        in_threads(
            world,
            lambda ranks: self._score(lambda tape, stream, mine: make(tape, stream, block, mine), tokens, ranks, kept),
        )
        return kept

    def _room(self, tokens: npt.NDArray[Any]) -> Tensor:
        return torch.full((len(tokens) - 1, self.vocab), float("nan"), dtype=torch.float64)

    def _score(
        self, make: Callable[[Tape, Stream, Ranks], Predictor], tokens: npt.NDArray[Any], ranks: Ranks, kept: Tensor
    ) -> None:
        def keep(positions: Index, chances: Tensor) -> None:
            kept[torch.from_numpy(positions)] = chances.detach().cpu()

        stream = self.stream(len(tokens) - 1)
        tape = Tape(tokens, self.device, stream.edges)
        predictor = make(tape, stream, ranks)
        watched = _Watched(predictor, self.model(predictor))
        drive(watched, stream, tape, tokens, self.vocab, Ledger(stream.targets), self.teller(keep), ranks)
        self.changed = watched.changed


def _places(stream: Stream, count: int, random: np.random.Generator) -> list[int]:
    """Tokens to flip: up to half of them the last target of a unit, where learning too early shows most (the last
    unit's first), the others spread over the text."""
    ends = [int(unit.windows.order[-1]) + 1 for unit in stream if len(unit.windows)][::-1][: max(1, count // 2)]
    return sorted({*ends, *_spread(stream.targets, max(count - len(ends), 0), random)})


def _spread(targets: int, count: int, random: np.random.Generator) -> list[int]:
    """One token by chance from each of `count` equal parts of the text; never token 0, which nothing comes before."""
    edges = np.linspace(1, targets + 1, count + 1).astype(int)
    return sorted({int(random.integers(a, max(b, a + 1))) for a, b in pairwise(edges)})


def _moved(base: Tensor, other: Tensor) -> Tensor:
    """The largest change of a log-probability at each position, in nats; infinite where one is not a number."""
    return (base - other).abs().amax(dim=1).nan_to_num(nan=float("inf"))


def _worst(moved: Tensor, allowed: float) -> tuple[float, float, int]:
    place = int(moved.argmax())
    return float(moved[place]), allowed, place


def _before(base: Tensor, other: Tensor, turn: Index, check: str, token: int, allowed: float) -> Finding:
    """Target i is token i+1: changing `token` may move what is coded after target token-1, and nothing else."""
    earlier = torch.from_numpy(np.flatnonzero(turn <= turn[token - 1]))
    worst, _, place = _worst(_moved(base[earlier], other[earlier]), allowed)
    return Finding(check, worst, allowed, int(earlier[place]), token)


def _shortened(spec: ScoreSpec, targets: int) -> ScoreSpec:
    if not spec.adapt.chunk:
        return spec
    shorter = max(1, min(spec.adapt.chunk, targets // 3) // spec.lanes) * spec.lanes
    return replace(spec, adapt=replace(spec.adapt, chunk=shorter))


def _shape(report: Report) -> dict[str, int]:
    return {"targets": report.targets, "units": report.units, "chunk": report.chunk}
