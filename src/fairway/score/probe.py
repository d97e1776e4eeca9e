"""Probe: change the text, and see which distributions move.

A distribution at target i may depend on tokens 0..i alone. The probe scores a short text through the same harness,
again and again: with single tokens changed, with the whole future changed, with other batch sizes. Nothing at a
position up to the change may move: exactly 0 in equal shapes on a CPU, at most 1e-3 nats across batch sizes and on
GPUs. Each distribution must sum to 1, and predicting must leave the model's state as it was.

It finds what types cannot forbid: a window that peeks at its own targets, training before scoring, a correction shared
by a batch (SLOT: one flipped target moved 240 of 240 other scores, #1240). It samples, so it can refute, not prove.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.artifact import open_artifact
from fairway.base.devices import Device
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.data import Tokens
from fairway.score.evaluate import byte_lengths, model_on, predictor_of, stream_of
from fairway.score.harness import drive
from fairway.score.ledger import Ledger
from fairway.score.predictor import Block, Predictor, Tape
from fairway.score.spec import ScoreSpec, Stage
from fairway.score.stream import Index, Stream, Unit

Maker = Callable[[Tape, Stream, int], Predictor]
"""(tape, stream, block tokens) -> a fresh predictor: every call must begin from the same state."""

# Equal shapes on a CPU repeat bit for bit; across shapes float32 and bf16 sums are ordered differently.
ACROSS_SHAPES = 1e-3  # nats
UNNORMALISED = 1e-9


@dataclass(frozen=True)
class Finding:
    """One check: the worst movement measured against what is allowed."""

    check: str  # "flip", "future", "batch", "normalised", "state", "repeat"
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
    temperature: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    model: Callable[[Predictor], torch.nn.Module | None] = lambda predictor: getattr(predictor, "model", None),
) -> Report:
    """Probes a predictor on a short text (a few chunks; V·N float64 numbers are held twice).

    make: builds a fresh predictor; stream: its order for a number of targets; exact: equal shapes must repeat bit for
    bit (CPU); model: where the predictor keeps the state that predicting must not change.
    """
    random = np.random.default_rng(seed)
    targets = len(tokens) - 1
    order = stream(targets)
    still = 0.0 if exact else ACROSS_SHAPES

    def distributions(text: npt.NDArray[Any], block: int) -> tuple[Tensor, int]:
        return _distributions(make, stream(targets), text, vocab, block, temperature, device, model)

    base, changed_states = distributions(tokens, block_tokens)
    findings = [
        Finding("normalised", *_worst((base.exp().sum(dim=1) - 1).abs(), UNNORMALISED)),
        Finding("state", float(changed_states), 0.0),
        Finding("repeat", *_worst(_moved(base, distributions(tokens, block_tokens)[0]), still)),
        Finding("batch", *_worst(_moved(base, distributions(tokens, 1)[0]), ACROSS_SHAPES)),
    ]
    for token in _places(order, flips, random):
        other = tokens.copy()
        other[token] = (int(other[token]) + random.integers(1, vocab)) % vocab
        findings.append(_after(base, distributions(other, block_tokens)[0], "flip", token, still))
    for token in _spread(targets, max(2, flips // 3), random):
        other = tokens.copy()
        other[token:] = random.integers(0, vocab, len(other) - token)
        findings.append(_after(base, distributions(other, block_tokens)[0], "future", token, still))
    return Report(stage, targets, len(order), order.chunk, tuple(findings))


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
    model = model_on(artifact, device)
    reports = []
    for stage in stages or spec.stages[2:]:
        probed = _shortened(spec, len(tokens) - 1) if stage == "adapted" else spec

        def make(tape: Tape, stream: Stream, block: int, stage: Stage = stage, probed: ScoreSpec = probed) -> Predictor:
            return predictor_of(copy.deepcopy(model), tape, stream, replace(probed, block_tokens=block), stage)

        def order(count: int, stage: Stage = stage, probed: ScoreSpec = probed) -> Stream:
            return stream_of(stage, count, probed, context)

        exact = next(model.parameters()).device.type == "cpu"
        where = next(model.parameters()).device
        found = examine(
            make, order, tokens, artifact.vocab, stage, flips, spec.block_tokens, exact, spec.temperature, seed, where
        )
        reports.append(found)
        run.fact(f"probe_{stage}", honest=found.honest, worst=asdict(found.worst), **_shape(found))
    return tuple(reports)


def state_hash(model: torch.nn.Module) -> str:
    """sha256 over all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Watched:
    """A predictor whose state is hashed around each `predict`."""

    def __init__(self, inner: Predictor, model: torch.nn.Module | None) -> None:
        self.inner, self.model, self.changed = inner, model, 0

    def predict(self, unit: Unit) -> Iterator[Block]:
        before = state_hash(self.model) if self.model is not None else ""
        yield from self.inner.predict(unit)
        self.changed += self.model is not None and state_hash(self.model) != before

    def perceive(self, unit: Unit) -> None:
        self.inner.perceive(unit)


def _distributions(
    make: Maker,
    stream: Stream,
    tokens: npt.NDArray[Any],
    vocab: int,
    block: int,
    temperature: float,
    device: torch.device | str,
    model: Callable[[Predictor], torch.nn.Module | None],
) -> tuple[Tensor, int]:
    """(N, vocab) float64 log-probabilities, and how many units changed the state while they were predicted."""
    kept = torch.full((len(tokens) - 1, vocab), float("nan"), dtype=torch.float64)

    def keep(positions: Index, chances: Tensor) -> None:
        kept[torch.from_numpy(positions)] = chances.detach().cpu()

    tape = Tape(tokens, device)
    predictor = make(tape, stream, block)
    watched = _Watched(predictor, model(predictor))
    drive(watched, stream, tape, tokens, vocab, Ledger(len(tokens) - 1), temperature, Ranks(), listen=keep)
    return kept, watched.changed


def _places(stream: Stream, count: int, random: np.random.Generator) -> list[int]:
    """Tokens to flip: up to half of them the last target of a unit, where learning too early shows most (the last
    unit's first), the others spread over the text."""
    ends = [unit.stop for unit in stream][::-1][: max(1, count // 2)]
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


def _after(base: Tensor, other: Tensor, check: str, token: int, allowed: float) -> Finding:
    """Target i is token i+1, predicted from tokens 0..i: changing `token` may move target `token` and later only."""
    return Finding(check, *_worst(_moved(base[:token], other[:token]), allowed), changed=token)


def _shortened(spec: ScoreSpec, targets: int) -> ScoreSpec:
    shorter = max(1, min(spec.adapt.chunk, targets // 3))
    return replace(spec, adapt=replace(spec.adapt, chunk=shorter))


def _shape(report: Report) -> dict[str, int]:
    return {"targets": report.targets, "units": report.units, "chunk": report.chunk}
