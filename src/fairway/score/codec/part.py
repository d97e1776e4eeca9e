"""One range coder's tokens, written and read: encoder and decoder drive the same predictor over the same stream.

The encoder predicts whole windows at once, the decoder one step at a time; integer distributions make the two equal.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fairway.artifact import Artifact
from fairway.base.devices import threads
from fairway.base.errors import ArtifactError
from fairway.model import GPT
from fairway.score import exact, range_coder
from fairway.score.codec import limits
from fairway.score.codec.format import STATE, Block, Part
from fairway.score.evaluate import adapter_of, model_on, predictor_of, stream_of
from fairway.score.exact_teller import Exact
from fairway.score.harness import drive
from fairway.score.ledger import Ledger
from fairway.score.predictor import Adapter, WindowPredictor
from fairway.score.spec import ScoreSpec, Stage
from fairway.score.state import tensors_hash
from fairway.score.stream import Index, Stream, Unit
from fairway.score.tape import BlankTape, Tape
from fairway.score.tellers import normalise

Progress = Callable[[int], None]
"""Called with the number of tokens done."""

# Kept as long as the opened file is: to build one took half of the seconds of a short text.
_unchanged: "WeakKeyDictionary[Artifact, GPT]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Encoded:
    """A part; what its tokens would cost without rounding (bits, by the float64 softmax) and what they cost by the
    integer distributions; how often the model learned before the last one."""

    part: Part
    ideal_bits: float
    coded_bits: float
    updates: int


class Coding(Exact):
    """Prices targets by the integer distributions, and keeps each one's interval for the range coder."""

    def __init__(self, targets: int, temperature: float, progress: Progress | None) -> None:
        super().__init__(temperature)
        self.progress, self.done = progress, 0
        self.left, self.count = np.zeros(targets, np.int64), np.zeros(targets, np.int64)
        self.near: list[tuple[int, int, int]] = []
        self.ideal_nats = 0.0

    def price(self, positions: Index, logits: Tensor, targets: Tensor) -> npt.NDArray[np.float64]:
        z = exact.grid(logits, self.temperature)
        near = exact.near(logits, self.temperature)
        self.near += zip(positions[near.rows].tolist(), near.symbols.tolist(), near.z.tolist(), strict=True)
        left, count = range_coder.intervals(exact.counts(z), targets.numpy())
        self.left[positions], self.count[positions] = left, count
        chances = normalise(logits, self.temperature)
        self.ideal_nats -= float(chances.gather(1, targets[:, None]).sum())
        self.done += len(positions)
        if self.progress is not None:
            self.progress(self.done)
        return exact.prices(count)


def encode_part(
    artifact: Artifact,
    tokens: npt.NDArray[Any],
    spec: ScoreSpec,
    stage: Stage,
    block: int,
    whole: int = 0,
    progress: Progress | None = None,
) -> Encoded:
    """tokens: (N+1,), BOS first; block: tokens of a block; whole: see Stream."""
    spec, trained = exact_spec(spec, stage), artifact.model_spec.context
    limits.check(spec, stage, trained, len(tokens) - 1, whole or len(tokens) - 1, spec.lanes)
    stream = stream_of(stage, len(tokens) - 1, spec, trained, whole)
    tape = Tape(tokens, "cpu", stream.edges)
    predictor = predictor_of(_model(artifact, stage), tape, stream, spec, stage)
    coding, coder = Coding(stream.targets, spec.temperature, progress), range_coder.encoder()
    ledger, checks = Ledger(stream.targets), _Checks(stream, block, predictor.adapter)
    updates = 0

    def after(unit: Unit) -> None:
        order = unit.windows.order
        coder.encode(coding.left[order], coding.count[order])

    def learned(unit: Unit) -> None:
        nonlocal updates
        updates += unit.update is not None
        checks.extend(unit, tokens[1:])

    drive(predictor, stream, tape, tokens, artifact.vocab, ledger, coding, None, after, learned)
    blocks = _with_near(checks, coding.near, stream)
    part = Part(stream.targets, stream.whole, stream.lanes, block, coder.finish(), blocks)
    bits = float(ledger.price(slice(None)).sum() / np.log(2))
    return Encoded(part, float(coding.ideal_nats / np.log(2)), bits, updates)


def decode_part(
    artifact: Artifact,
    part: Part,
    spec: ScoreSpec,
    stage: Stage,
    name: str,
    progress: Progress | None = None,
) -> npt.NDArray[np.uint16]:
    """The part's tokens, (targets,) uint16. ArtifactError naming the block whose checksum is not met."""
    spec = exactly(spec, stage, part, name)
    stream = stream_of(stage, part.targets, spec, artifact.model_spec.context, part.whole)
    tape = BlankTape(artifact.tokenizer.bos, stream.edges)
    predictor = predictor_of(_model(artifact, stage), tape, stream, spec, stage)
    checks = _Checks(stream, part.block, predictor.adapter)
    reader = Reader(range_coder.decoder(part.words), part, spec.temperature, progress, name)
    for unit in stream:
        reader.read(predictor, unit, tape)
        predictor.perceive(unit)
        for number, found in checks.extend(unit, tape.so_far):
            _compare(found, part.blocks[number], number, name)
    return tape.tokens.astype(np.uint16)


class Reader:
    """Reads tokens off a range coder, step by step, and writes them on the tape.

    Each block meets its checksum as soon as it is complete, however long the unit is: no damage is decoded for longer.
    """

    def __init__(
        self,
        coder: range_coder.Decoder,
        part: Part,
        temperature: float,
        progress: Progress | None,
        name: str = "file",
    ) -> None:
        self.coder, self.part, self.temperature, self.progress, self.name = coder, part, temperature, progress, name
        self.done, self.block, self.crc = 0, 0, 0  # tokens; complete blocks; the checksum so far of the one at work
        self.near: dict[int, list[tuple[int, int]]] = {}
        for block in part.blocks:
            for position, symbol, z in block.near:
                self.near.setdefault(position, []).append((symbol, z))

    def read(self, predictor: WindowPredictor, unit: Unit, tape: BlankTape) -> None:
        with threads(1):  # single tokens are slower on several: 286 against 94 a second
            for windows, step, logits in predictor.steps(unit):
                symbols = self._symbols(logits, windows.first + step)
                tape.write(windows, step, symbols)
                self._check(symbols)
                if self.progress is not None:
                    self.progress(self.done)

    def _symbols(self, logits: Tensor, positions: Index) -> exact.Ints:
        try:
            z = exact.grid(logits, self.temperature)
            if self.near:
                self._overrule(z, positions)
            return self.coder.decode(exact.counts(z))
        except ArtifactError as error:
            raise ArtifactError(f"{self.name}: block {self.block}: {error}") from error

    def _check(self, symbols: exact.Ints) -> None:
        """Takes the next tokens into the checksum of their block, or of several."""
        while len(symbols):
            taken = min(len(symbols), self.part.block - self.done % self.part.block)
            self.crc = zlib.crc32(_raw(symbols[:taken]), self.crc)
            self.done, symbols = self.done + taken, symbols[taken:]
            if self.done % self.part.block and self.done < self.part.targets:
                continue
            listed = self.part.blocks[self.block]
            if self.crc != listed.tokens:
                learned = ", or this machine learned otherwise" if listed.state else ""
                raise ArtifactError(
                    f"{self.name}: block {self.block}: its tokens do not meet their checksum; the file is "
                    f"damaged{learned}"
                )
            self.block, self.crc = self.block + 1, 0

    def _overrule(self, z: exact.Ints, positions: Index) -> None:
        listed = [(row, *entry) for row, place in enumerate(positions.tolist()) for entry in self.near.get(place, ())]
        if listed:
            exact.overrule(z, exact.Near(*(np.array(column, np.int64) for column in zip(*listed, strict=True))))


def _model(artifact: Artifact, stage: Stage) -> GPT:
    """The model in float64: one for all parts that nothing is learned from, a fresh one for each of the others."""
    if stage == "adapted":
        return model_on(artifact, None, exact=True)
    if artifact not in _unchanged:
        _unchanged[artifact] = model_on(artifact, None, exact=True)
    return _unchanged[artifact]


def trial(artifact: Artifact, spec: ScoreSpec) -> str:
    """A fingerprint of how this machine learns: 16 hex digits of the state's hash after one chunk of made-up text, at
    most two contexts of it. A library or a processor that rounds otherwise gives another."""
    chunk = min(int(spec.adapt.chunk), 2 * (spec.context or artifact.model_spec.context))
    made = np.arange(chunk + 2, dtype=np.int64) ** 2 % artifact.vocab
    made[0] = artifact.tokenizer.bos
    spec = replace(exact_spec(spec, "adapted"), lanes=1, adapt=replace(spec.adapt, chunk=chunk))
    stream = stream_of("adapted", chunk + 1, spec, artifact.model_spec.context)
    adapter = adapter_of(model_on(artifact, None, exact=True), stream, spec, "adapted")
    tape = Tape(made, "cpu", stream.edges)
    tape.open_to(stream.edges[1:])
    with threads(1):
        adapter.learn(next(iter(stream)), tape)
    return tensors_hash(adapter.state())[: 2 * STATE]


class _Checks:
    """Blocks in the order of coding, and what is known of each once it is complete."""

    def __init__(self, stream: Stream, block: int, adapter: Adapter) -> None:
        self.stream, self.block, self.adapter = stream, block, adapter
        self.found: list[Block] = []
        self.coded: npt.NDArray[np.uint16] = np.zeros(0, np.uint16)

    def extend(self, unit: Unit, targets: npt.NDArray[Any]) -> Iterator[tuple[int, Block]]:
        """targets: (N,), as far as they are known; the blocks that this unit completes."""
        self.coded = np.concatenate([self.coded, targets[unit.windows.order].astype(np.uint16)])
        last = unit.done == self.stream.targets
        state, first = b"", len(self.found)
        while len(self.coded) >= self.block or (last and len(self.coded)):
            if not state and _learns(self.stream):
                state = bytes.fromhex(tensors_hash(self.adapter.state()))[:STATE]
            tokens, self.coded = self.coded[: self.block], self.coded[self.block :]
            self.found.append(Block(checksum(tokens), state))
        return iter(list(enumerate(self.found))[first:])


def _with_near(checks: _Checks, near: list[tuple[int, int, int]], stream: Stream) -> tuple[Block, ...]:
    """The blocks with the roundings that belong to them."""
    turn = np.empty(stream.targets, np.int64)
    turn[stream.order] = np.arange(stream.targets)
    lists: list[list[tuple[int, int, int]]] = [[] for _ in checks.found]
    for entry in sorted(near):
        lists[int(turn[entry[0]]) // checks.block].append(entry)
    return tuple(replace(block, near=tuple(own)) for block, own in zip(checks.found, lists, strict=True))


def _compare(found: Block, listed: Block, number: int, name: str) -> None:
    if found.state != listed.state:
        raise ArtifactError(
            f"{name}: block {number}: the adapted state is another one here; decode with the library and the processor "
            "type that wrote it"
        )
    if found.tokens != listed.tokens:
        raise ArtifactError(f"{name}: block {number}: its tokens do not meet their checksum; the file is damaged")


def learns_in(artifact: Artifact, part: Part, spec: ScoreSpec, stage: Stage, name: str) -> bool:
    """Whether something is learned before the part's last token."""
    whole = exactly(spec, stage, part, name)
    return _learns(stream_of(stage, part.targets, whole, artifact.model_spec.context, part.whole))


def _learns(stream: Stream) -> bool:
    return stream.chunk > 0 and len(stream) > 1


def exact_spec(spec: ScoreSpec, stage: Stage) -> ScoreSpec:
    return replace(spec, exact=True, result=stage)


def exactly(spec: ScoreSpec, stage: Stage, part: Part, name: str) -> ScoreSpec:
    """The settings with a part's lanes. ArtifactError where they do not go together."""
    try:
        return replace(exact_spec(spec, stage), lanes=part.lanes)
    except ValueError as error:
        raise ArtifactError(f"{name}: {error}") from error


def checksum(tokens: npt.NDArray[Any]) -> int:
    """crc32 of tokens (n,) as 16-bit numbers."""
    return zlib.crc32(_raw(tokens))


def _raw(tokens: npt.NDArray[Any]) -> bytes:
    return tokens.astype("<u2").tobytes()
