"""A file and a text -> bits per byte. Only the opened file may speak.

Stages: `float` (plain windows; the float weights, opened through the same reader), `quantized` (the same windows, the
artifact), `sliding` (the recipe's windows, their logits changed by what `score.reshape` names) and `adapted` (these,
learning from what is paid). Each opens its file itself and has a ledger and a clock of its own, from opening the file
to its last payment.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairway.artifact import Artifact, open_artifact
from fairway.base.clock import Stopwatch, hold
from fairway.base.devices import Device
from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.base.slots import kind_of, module_of, optional
from fairway.data.tokens import Tokens, miscounted
from fairway.model import GPT
from fairway.score.adapt import none
from fairway.score.harness import drive
from fairway.score.ledger import Ledger
from fairway.score.predictor import Adapter, Network, WindowPredictor
from fairway.score.spec import ScoreSpec, Stage
from fairway.score.stream import Stream, Unit
from fairway.score.tape import Tape
from fairway.score.tellers import Listener, Softmax, Teller
from fairway.score.windows import plain


@dataclass(frozen=True)
class StageScore:
    """One stage's score. bits_per_byte = code_length_bits / text_bytes, from the ledger."""

    stage: Stage
    bits_per_byte: float
    code_length_bits: float
    tokens: int  # targets, each paid once
    text_bytes: int  # of the original text, or of the decoded tokens where `decoded`
    seconds: float  # from opening the file to the last payment
    decoded: bool  # the text is what the tokens decode to: the tokenizer cannot return the original
    text_sha256: str
    artifact_sha256: str
    compute: str = "float32"  # type of the activations
    exact: bool = False  # paid by the integer distributions that a decoder computes again


def evaluate(
    path: Path,
    held_out: Tokens,
    spec: ScoreSpec,
    run: Run,
    stage: Stage,
    device: Device | None = None,
    limit: float = 0.0,
    keep: Any = None,
) -> StageScore:
    """Opens the file at `path` (the float weights for the stage `float`) and scores the text with it.

    Raises DataError (the text is empty, or not what the tokenizer of the file makes of it), HonestyError (the score
    would be false), BudgetError on all ranks (the stage is, or will be, over `limit` seconds; 0: no limit). keep: a
    fairway.score.profile.Keeper, for what the stage paid.
    """
    watch = Stopwatch().start()
    return score_opened(open_artifact(path), held_out, spec, run, stage, device, watch, limit, keep)


def score_opened(
    artifact: Artifact,
    held_out: Tokens,
    spec: ScoreSpec,
    run: Run,
    stage: Stage,
    device: Device | None = None,
    watch: Stopwatch | None = None,
    limit: float = 0.0,
    keep: Any = None,
) -> StageScore:
    """`evaluate` for a file that is already open. The artifact itself is never changed."""
    watch = watch or Stopwatch().start()
    lengths = byte_lengths(artifact, held_out)
    stream = stream_of(stage, len(lengths), spec, artifact.model_spec.context)
    model = model_on(artifact, device, is_exact(spec, stage))
    ledger = Ledger(len(lengths))
    booking: Any = None  # fairway.score.booking.Booking
    if is_exact(spec, stage):
        books = optional("fairway.score.exact_teller").books
        booking = books(run, ledger, stream, spec, stage, device, held_out.text_sha256, artifact.sha256)
    with run.meter(stage, len(lengths), "tokens") as meter:
        pace: Callable[[Unit], None] | None = None
        if limit or not run.quiet:
            pace = optional("fairway.score.pace").Pace(stage, ledger, lengths, limit, watch, run.ranks, meter)
        score_model(model, held_out.tokens, stream, spec, stage, artifact.vocab, ledger, run.ranks, pace, None, booking)
    seconds = watch.stop()
    hold(f"{stage} score", seconds, limit, "s", REMEDY, run.ranks)
    if booking is not None:
        booking.close()
    if stage == spec.result and run.folder is not None:
        optional("fairway.score.prices").write_prices(run, ledger)
    if keep is not None:
        keep(stage, ledger, held_out, lengths, artifact)
    compute = str(model.compute or next(model.parameters()).dtype).removeprefix("torch.")
    score = _stage_score(stage, ledger, held_out, seconds, artifact, compute, is_exact(spec, stage))
    run.fact(f"score_{stage}", **asdict(score), units=len(stream), windows=len(stream.windows))
    return score


REMEDY = "take a larger stride, fewer epochs, or raise budget.eval_seconds"


def is_exact(spec: ScoreSpec, stage: Stage) -> bool:
    """Whether a stage is scored in exact mode: the result, where the recipe says so."""
    return spec.exact and stage == spec.result


def model_on(artifact: Artifact, device: Device | None, exact: bool = False) -> GPT:
    """A fresh model of the file on a device, computing in the device's type; in exact mode in float64, on the CPU."""
    if exact:
        return artifact.model("cpu").double()
    model = artifact.model(device.torch if device is not None else None)
    if device is not None:
        model.compute = device.compute
    return model


def stream_of(stage: Stage, targets: int, spec: ScoreSpec, trained_context: int, whole: int = 0) -> Stream:
    """The order of a stage over `targets` targets: fixed by the spec and the lengths alone. whole: see Stream."""
    context = spec.context or trained_context
    if stage == "adapted" and not spec.adapts:
        raise RecipeError('stage adapted: score.adapt = "none"; name a technique of adapt, such as "ttt"')
    block = max(1, spec.block_tokens // context)
    if stage in ("float", "quantized"):
        return Stream(targets, context, plain.Spec(), block=block, whole=whole)
    chunk = int(spec.adapt.chunk) if stage == "adapted" else 0
    if stage == "adapted" and not chunk and kind_of(spec.windows) in ("rolling", "plain"):
        raise RecipeError(
            f"score.adapt = {kind_of(spec.adapt)!r} learns from the context of a window, and {kind_of(spec.windows)} "
            'windows have none; take score.windows = "sliding"'
        )
    return Stream(targets, context, spec.windows, chunk, block, spec.lanes, whole)


def adapter_of(model: Network, stream: Stream, spec: ScoreSpec, stage: Stage, ranks: Ranks | None = None) -> Adapter:
    """What learns in a stage; in exact mode every rank learns all of it alone, so that no sum depends on the ranks."""
    technique = spec.adapt if stage == "adapted" else none.Spec()
    alone = ranks is None or is_exact(spec, stage)
    made: Adapter = module_of(technique).Adapter(model, technique, stream.chunks, Ranks() if alone else ranks)
    return made


def predictor_of(
    model: Network, tape: Tape, stream: Stream, spec: ScoreSpec, stage: Stage, ranks: Ranks | None = None
) -> WindowPredictor:
    """The predictor of a stage; for `adapted` it learns, so that `model` is changed by being scored."""
    adapter = adapter_of(model, stream, spec, stage, ranks)
    carried = stream if stream.carried else None
    made = WindowPredictor(model, tape, adapter, spec.block_tokens, carried, is_exact(spec, stage))
    if spec.reshape and stage in ("sliding", "adapted"):
        made = optional("fairway.score.reshaping").Reshaped(made, spec.reshape)
    return made


def teller_of(spec: ScoreSpec, stage: Stage, listen: Listener | None = None) -> Teller:
    """What a stage's distributions are made with."""
    if is_exact(spec, stage):
        made: Teller = optional("fairway.score.exact_teller").Exact(spec.temperature, listen)
        return made
    return Softmax(spec.temperature, listen)


def score_model(
    model: Network,
    tokens: npt.NDArray[Any],
    stream: Stream,
    spec: ScoreSpec,
    stage: Stage,
    vocab: int,
    ledger: Ledger,
    ranks: Ranks | None = None,
    after: Callable[[Unit], None] | None = None,
    listen: Listener | None = None,
    booking: Any = None,
) -> float:
    """Drives a stage's predictor through its stream; the code length in nats."""
    tape = Tape(tokens, next(iter(model.parameters())).device, stream.edges)
    predictor = predictor_of(model, tape, stream, spec, stage, ranks)
    if booking is not None:
        booking.begin_with(predictor.adapter)
    return drive(predictor, stream, tape, tokens, vocab, ledger, teller_of(spec, stage, listen), ranks, after, booking)


def byte_lengths(artifact: Artifact, held_out: Tokens) -> npt.NDArray[np.int64]:
    """Bytes of each target, (N,). DataError unless they add up to the text's bytes, are these bytes, and every token
    exists; it names the token that is another."""
    tokens = np.asarray(held_out.tokens)
    if len(tokens) < 2 or held_out.text_bytes < 1:
        raise DataError(
            f"text of {held_out.text_bytes} bytes ({max(len(tokens) - 1, 0)} targets): "
            "nothing to score; give a text of at least one byte"
        )
    if int(tokens.max()) >= artifact.vocab:
        raise DataError(
            f"token {int(tokens.max())}: the artifact's vocabulary has {artifact.vocab}; tokenize with its tokenizer"
        )
    lengths = artifact.tokenizer.byte_lengths(tokens[1:], tokens[:-1])
    counted = int(lengths.sum()) == held_out.text_bytes
    if not counted or artifact.tokenizer.decode(tokens[1:], previous=int(tokens[0])) != held_out.text:
        raise miscounted(tokens, artifact.tokenizer, held_out.text)
    return lengths


def _stage_score(
    stage: Stage,
    ledger: Ledger,
    held_out: Tokens,
    seconds: float,
    artifact: Artifact,
    compute: str,
    exact: bool,
) -> StageScore:
    bits = ledger.code_length_bits
    return StageScore(
        stage=stage,
        bits_per_byte=bits / held_out.text_bytes,
        code_length_bits=bits,
        tokens=len(ledger),
        text_bytes=held_out.text_bytes,
        seconds=seconds,
        decoded=held_out.decoded,
        text_sha256=held_out.text_sha256,
        artifact_sha256=artifact.sha256,
        compute=compute,
        exact=exact,
    )
