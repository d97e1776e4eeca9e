"""Proof of chunks: a long adapted text is too long to decode, but every chunk of it can be asked for.

In exact mode a score books the hash of the state (adapted weights and the optimiser's moments) at every chunk's start.
Some chunks are drawn from the hash of the artifact, the text, all that was booked and a nonce given afterwards: nobody
can choose them. For a drawn chunk c the step from chunk c-1 to c is taken again and the hashes are compared; then c is
written as a file, and decoded by another process from that state. One false step among C is drawn, and caught, with a
chance of about K/C.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from fairway.artifact import Artifact, open_artifact
from fairway.base.clock import Stopwatch
from fairway.base.devices import threads
from fairway.base.errors import ArtifactError, DataError, HonestyError, RecipeError
from fairway.base.journal import Run
from fairway.data import Tokens
from fairway.score import exact, range_coder
from fairway.score.booking import SNAPSHOTS, Booked, read_booked, read_state, snapshot_path
from fairway.score.codec.files import assemble, header_of
from fairway.score.codec.format import Block, Part, Segment
from fairway.score.codec.part import Coding, Encoded, Reader, checksum, exactly
from fairway.score.evaluate import adapter_of, byte_lengths, model_on, predictor_of, stream_of
from fairway.score.predictor import Adapter, WindowPredictor
from fairway.score.proof import decode_elsewhere
from fairway.score.reshaping import learns
from fairway.score.spec import ScoreSpec
from fairway.score.state import tensors_hash
from fairway.score.stream import Stream, Unit
from fairway.score.tape import BlankTape, Tape


@dataclass(frozen=True)
class ChunkProof:
    """What the proof of some chunks saw; the object that `fairway prove --chunks --json` prints.

    catches: the chance that one false step among all is among those that were proven; bits: as in Proof, of the proven
    chunks.
    """

    decoded_equal: bool
    chunks: tuple[int, ...]
    of_chunks: int
    catches: float
    nonce: str
    books_sha256: str  # to be known before the nonce is given, or nonces could be tried
    replayed: int  # steps from chunk to chunk that were taken again
    file_bytes: int
    text_bytes: int
    bits_per_byte: float
    ideal_bits: float
    gap_percent: float
    booked_bits: float  # of all chunks: the whole score, as the books have it
    framing_bytes: int
    updates: int
    seconds: float

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def prove_chunks(
    path: Path,
    held_out: Tokens,
    spec: ScoreSpec,
    run: Run,
    folder: Path,
    count: int,
    nonce: str,
    claimed_bits: float | None = None,
) -> ChunkProof:
    """Proves `count` chunks of the adapted score that is booked in `folder`.

    claimed_bits: the code length of the score, where it is known: the books of all chunks must come to it.
    RecipeError where there are no such books, or the windows are carried (what a chunk sees then begins with the text);
    DataError where they are another artifact's or text's; HonestyError where a state, a price or a byte is another.
    """
    watch = Stopwatch().start()
    booked, artifact = read_booked(folder), open_artifact(path)
    lengths = byte_lengths(artifact, held_out)
    stream = stream_of("adapted", len(lengths), spec, artifact.model_spec.context)
    _same(booked, artifact, held_out, stream, spec, count)
    booked_nats = _nats(booked)
    booked_bits = sum(booked_nats) / np.log(2)
    if claimed_bits is not None and not abs(booked_bits - claimed_bits) <= 1e-9 * claimed_bits:
        raise HonestyError(f"chunks: {booked_bits:.6f} bits are booked, the score claims {claimed_bits:.6f}; no score")
    drawn = draw(booked, count, nonce)
    run.say(f"chunks        {', '.join(map(str, drawn))} of {len(stream)}, drawn by artifact, text, books and nonce")
    steps = _Steps(artifact, held_out.tokens, spec, stream, booked, folder)
    coded, expected_bytes = [], 0
    with run.meter("prove", len(drawn), "chunks") as meter:
        for done, chunk in enumerate(drawn, start=1):
            steps.go_to(chunk)
            unit = steps.units[chunk]
            if not len(unit.windows):  # windows longer than a chunk: what it scores came with the one before
                if booked_nats[chunk]:
                    raise HonestyError(f"chunk {chunk}: scores nothing, {booked_nats[chunk]:.6f} nats were booked")
                continue
            encoded = encode_chunk(artifact, held_out.tokens, spec, stream, unit, steps.state)
            nats = encoded.coded_bits * np.log(2)
            if not abs(nats - booked_nats[chunk]) <= 1e-9 * max(nats, 1.0):
                raise HonestyError(
                    f"chunk {chunk}: costs {nats:.6f} nats, {booked_nats[chunk]:.6f} were booked; this is no score"
                )
            expected = _text(artifact, held_out.tokens[1:], stream, unit)
            one = assemble(artifact, [Segment(len(expected), (encoded.part,))], [encoded], spec, "adapted", chunk)
            state = safetensors.torch.save(steps.state) if steps.state else b""
            before = known_before(held_out.tokens, stream, unit, spec).astype("<u2").tobytes()
            decoded = decode_elsewhere(path, one.content, run, "decode-chunk", state=state, before=before)
            if decoded != expected:
                raise HonestyError(f"chunk {chunk}: decodes to other bytes than the text; this is no score")
            coded.append(one)
            expected_bytes += len(expected)
            meter.update(done)
    if not expected_bytes:
        raise DataError(f"--chunks {count}: the drawn chunks score nothing of their own; ask for more")
    size, ideal = sum(len(one.content) for one in coded), sum(one.ideal_bits for one in coded)
    return ChunkProof(
        decoded_equal=True,
        chunks=tuple(drawn),
        of_chunks=len(stream),
        catches=len(drawn) / len(stream),
        nonce=nonce,
        books_sha256=booked.sha256,
        replayed=steps.replayed,
        file_bytes=size,
        text_bytes=expected_bytes,
        bits_per_byte=8 * size / expected_bytes,
        ideal_bits=ideal,
        gap_percent=100 * (8 * size / ideal - 1),
        booked_bits=booked_bits,
        framing_bytes=sum(one.framing_bytes for one in coded),
        updates=steps.replayed,
        seconds=round(watch.stop(), 3),
    )


def draw(booked: Booked, count: int, nonce: str) -> list[int]:
    """`count` different chunks, ascending: by the sha256 of a counter after the digest of everything booked."""
    digest, total = _digest(booked, nonce), len(booked.nats)
    keys = sorted(range(total), key=lambda chunk: hashlib.sha256(digest + chunk.to_bytes(8, "little")).digest())
    return sorted(keys[:count])


def encode_chunk(
    artifact: Artifact,
    tokens: npt.NDArray[Any],
    spec: ScoreSpec,
    stream: Stream,
    unit: Unit,
    state: dict[str, Tensor],
) -> Encoded:
    """One chunk as a part of its own, from the state before it."""
    tape = Tape(tokens, "cpu", stream.edges)
    tape.open_to(unit.stop - 1)
    predictor = _predictor(artifact, tape, stream, spec, state)
    coding, coder = Coding(stream.targets, spec.temperature, None), range_coder.encoder()
    for positions, logits in predictor.predict(unit):
        coding.price(positions, logits, torch.from_numpy(tokens[positions + 1].astype(np.int64)))
    order = unit.windows.order
    coder.encode(coding.left[order], coding.count[order])
    block = Block(checksum(tokens[1 + order]), bytes.fromhex(tensors_hash(state))[:8], tuple(sorted(coding.near)))
    part = Part(len(order), stream.whole, stream.lanes, len(order), coder.finish(), (block,))
    prices = exact.prices(coding.count[order])
    return Encoded(part, float(coding.ideal_nats / np.log(2)), float(prices.sum() / np.log(2)), 0)


def decode_chunk(artifact: Artifact, content: bytes, state: bytes, before: bytes, name: str) -> bytes:
    """The bytes of a chunk, from the state before it and the tokens that its windows look back on."""
    header, segments, spec = header_of(artifact, content, name)
    if header.chunk is None or len(segments) != 1 or len(segments[0].parts) != 1 or header.stage != "adapted":
        raise ArtifactError(f"{name}: is no chunk of an adapted text; use `fairway decompress`")
    part = segments[0].parts[0]
    stream = stream_of("adapted", part.whole, exactly(spec, "adapted", part, name), artifact.model_spec.context)
    unit = next((unit for unit in stream if unit.index == header.chunk), None)
    if unit is None or stream.carried or unit.windows.scored != part.targets or len(part.blocks) != 1:
        raise ArtifactError(f"{name}: chunk {header.chunk} of {len(stream)}: impossible")
    try:
        tensors = dict(safetensors.torch.load(state)) if state else {}
        known = np.frombuffer(before, dtype="<u2")
    except Exception as error:
        raise ArtifactError(f"{name}: the state before it is damaged ({error})") from error
    tape = BlankTape(artifact.tokenizer.bos, stream.edges)
    spans = _before(stream, unit, spec)
    if sum(high - low for low, high in spans) != len(known):
        raise ArtifactError(f"{name}: {len(known)} tokens before it, its windows look back on others")
    tape.given(spans, known)
    if bytes.fromhex(tensors_hash(tensors))[:8] != part.blocks[0].state:
        raise ArtifactError(f"{name}: the state before it is not the one that it was written from")
    predictor = _predictor(artifact, tape, stream, spec, tensors)
    Reader(range_coder.decoder(part.words), part, spec.temperature, None).read(predictor, unit, tape)
    if checksum(tape.so_far[unit.windows.order]) != part.blocks[0].tokens:
        raise ArtifactError(f"{name}: chunk {header.chunk}: its tokens do not meet their checksum; the file is damaged")
    return _text(artifact, tape.so_far, stream, unit)


def known_before(tokens: npt.NDArray[Any], stream: Stream, unit: Unit, spec: ScoreSpec) -> npt.NDArray[Any]:
    """The tokens that a chunk's windows look back on, lane after lane."""
    return np.concatenate([tokens[1 + low : 1 + high] for low, high in _before(stream, unit, spec)])


class _Steps:
    """What was learned, taken again from the nearest state that is kept."""

    def __init__(
        self,
        artifact: Artifact,
        tokens: npt.NDArray[Any],
        spec: ScoreSpec,
        stream: Stream,
        booked: Booked,
        folder: Path,
    ) -> None:
        self.artifact, self.spec, self.stream, self.booked, self.folder = artifact, spec, stream, booked, folder
        self.tape = Tape(tokens, "cpu", stream.edges)
        self.tape.open_to(stream.edges[1:])
        self.units = list(stream)
        self.at, self.replayed = 0, 0
        self.adapter = self._fresh()
        self._check(0)

    @property
    def state(self) -> dict[str, Tensor]:
        return self.adapter.state()

    def go_to(self, chunk: int) -> None:
        """The state at the start of `chunk`; at least the last step to it is taken, not loaded."""
        nearest = max((kept for kept in self.booked.snapshots if kept < chunk), default=0)
        if nearest > self.at:
            self.adapter = self._fresh()
            self.adapter.load(read_state(snapshot_path(self.folder / SNAPSHOTS, nearest)))
            self.at = nearest
            self._check(nearest)
        while self.at < chunk:
            with threads(1):
                self.adapter.learn(self.units[self.at], self.tape)
            self.at += 1
            self.replayed += 1
            self._check(self.at)

    def _check(self, chunk: int) -> None:
        found = tensors_hash(self.adapter.state())
        if found != self.booked.states[chunk]:
            raise HonestyError(
                f"chunk {chunk}: the state at its start is {found[:16]}, {self.booked.states[chunk][:16]} was booked; "
                "this is no score (or another library or processor computed it)"
            )

    def _fresh(self) -> Adapter:
        return adapter_of(model_on(self.artifact, None, exact=True), self.stream, self.spec, "adapted")


def _predictor(
    artifact: Artifact, tape: Tape, stream: Stream, spec: ScoreSpec, state: dict[str, Tensor]
) -> WindowPredictor:
    predictor = predictor_of(model_on(artifact, None, exact=True), tape, stream, spec, "adapted")
    if state:
        predictor.adapter.load(state)
    return predictor


def _before(stream: Stream, unit: Unit, spec: ScoreSpec) -> list[tuple[int, int]]:
    """Of every lane, the targets [low, high) that the unit's windows read and do not score: what input `start` tells is
    target start-1. Where a technique of score/reshape is told every token, all of them: it is told them again."""
    spans, told = [], learns(spec.reshape)
    for lane in range(stream.lanes):
        mine = unit.windows[unit.windows.lane == lane]
        if len(mine):
            low = int(stream.edges[lane])
            spans.append((low if told else max(int(mine.start.min()) - 1, low), int(mine.first.min())))
    return spans


def _text(artifact: Artifact, targets: npt.NDArray[Any], stream: Stream, unit: Unit) -> bytes:
    """The bytes of a unit's targets, lane after lane; a lane begins with BOS, which takes a space from some
    tokenizers' first token."""
    positions, texts = np.sort(unit.windows.positions), []
    for span in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
        begins = int(span[0]) in stream.edges
        previous = artifact.tokenizer.bos if begins else targets[: span[0]]
        texts.append(artifact.tokenizer.decode(targets[span], previous=previous))
    return b"".join(texts)


def _same(booked: Booked, artifact: Artifact, held_out: Tokens, stream: Stream, spec: ScoreSpec, count: int) -> None:
    if stream.carried:
        raise RecipeError(
            'score.windows = "rolling": what a chunk sees begins with the text; prove a slice or --full, not --chunks'
        )
    if not 1 <= count <= len(stream):
        raise RecipeError(f"--chunks {count}: 1 to {len(stream)} are possible")
    if (booked.artifact_sha256, booked.text_sha256) != (artifact.sha256, held_out.text_sha256):
        raise DataError("the books are of another artifact or another text; score the run again")
    if (booked.chunk, len(booked.states), len(booked.nats)) != (stream.chunk, len(stream), len(stream)):
        raise DataError("the books are not of this stream; score the run again")


def _nats(booked: Booked) -> list[float]:
    """What each chunk cost. DataError where it is no number, or none that a text can cost."""
    try:
        nats = [float.fromhex(value) for value in booked.nats]
    except (ValueError, OverflowError) as error:
        raise DataError(f"the books are damaged ({error}); score the run again") from error
    if not all(0 <= value < float("inf") for value in nats):  # nor NaN, which no comparison would refuse
        raise DataError("the books are damaged (a price that is no number); score the run again")
    return nats


def _digest(booked: Booked, nonce: str) -> bytes:
    return hashlib.sha256(f"{booked.sha256} {nonce}".encode()).digest()
