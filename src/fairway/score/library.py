"""For people's own programs: score a string, look at the distributions.

artifact = open_artifact("runs/latest/artifact.fw")
print(score_text(artifact, b"To be, or not to be").bits_per_byte)
tokens, log_probabilities = distributions(artifact, b"To be, or not to be")
"""

from typing import Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

from fairway.artifact import Artifact
from fairway.base.devices import Device
from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.data import Corpus, Tokens, tokenize
from fairway.score.evaluate import (
    StageScore,
    byte_lengths,
    is_exact,
    model_on,
    score_model,
    score_opened,
    stream_of,
)
from fairway.score.ledger import Ledger
from fairway.score.spec import ScoreSpec, Stage, spec_of
from fairway.score.stream import Index

Lossy = Literal["refuse", "score_decoded"]


def tokens_of(artifact: Artifact, text: bytes, lossy: Lossy = "refuse") -> Tokens:
    """One document as the tokens of the artifact's tokenizer. DataError for an empty text, or one it cannot return."""
    if not text:
        raise DataError("text of 0 bytes: nothing to score; give at least one byte")
    return tokenize(Corpus("valid", (text,)), artifact.tokenizer, lossy)


def score_text(
    artifact: Artifact,
    text: bytes,
    spec: ScoreSpec | None = None,
    stage: Stage | None = None,
    run: Run | None = None,
    device: Device | None = None,
    lossy: Lossy = "refuse",
) -> StageScore:
    """Bits per byte of `text`: by default as the file says, at the stage that it names as its result."""
    spec = spec or spec_of(artifact)
    held_out = tokens_of(artifact, text, lossy)
    return score_opened(artifact, held_out, spec, run or Run(), stage or spec.result, device)


def distributions(
    artifact: Artifact,
    text: bytes,
    spec: ScoreSpec | None = None,
    stage: Stage | None = None,
    device: Device | None = None,
    lossy: Lossy = "refuse",
) -> tuple[npt.NDArray[Any], Tensor]:
    """The text's tokens (N+1,), BOS first, and the log-probabilities in nats that each next token was paid by:
    (N, vocab) float64; row i is predicted from tokens 0..i. Holds N × vocab × 8 bytes: for short texts."""
    spec = spec or spec_of(artifact)
    stage = stage or spec.result
    tokens = tokens_of(artifact, text, lossy)
    targets = len(byte_lengths(artifact, tokens))
    kept = torch.empty(targets, artifact.vocab, dtype=torch.float64)

    def keep(positions: Index, chances: Tensor) -> None:
        kept[torch.from_numpy(positions)] = chances.cpu()

    stream = stream_of(stage, targets, spec, artifact.model_spec.context)
    model = model_on(artifact, device, is_exact(spec, stage))
    score_model(model, tokens.tokens, stream, spec, stage, artifact.vocab, Ledger(targets), Ranks(), listen=keep)
    return tokens.tokens, kept
