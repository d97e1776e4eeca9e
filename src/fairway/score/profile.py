"""What a score leaves behind for those who compare and draw: where its bits went, document by document, along the text,
and token by token at its beginning. Sums, not prices: about 2 MB at 50,000 documents.
"""

import codecs
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch

from fairway.artifact import Artifact
from fairway.base import files
from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.data.tokens import Tokens
from fairway.score.ledger import Ledger

PROFILE = "profile.npz"
BUCKETS = 200  # stretches of the text of equal bytes
SAMPLE = 300  # tokens at the beginning of the text, each with its own price

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bits:
    """Where one stage's bits went: by document (D,), by bucket (B,), by token of the sample (S,). The first two add up
    to the stage's code length."""

    documents: Floats
    buckets: Floats
    sample: Floats
    artifact_sha256: str  # of the file that was scored: the weights' for the stage float


@dataclass(frozen=True)
class Profile:
    """A held-out text, and what each stage paid for its parts.

    A document begins with the target that is BOS (the first with the text), so that its bits include those of BOS.
    documents: (3, D) first target, targets, bytes; buckets: (2, B) targets, bytes, in the order of the text; sample:
    (S,) the first tokens after BOS; pieces: the bytes of each (none for BOS).
    """

    text_sha256: str
    text_bytes: int
    documents: Ints
    buckets: Ints
    sample: Ints
    pieces: tuple[bytes, ...]
    stages: dict[str, Bits] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        """The pieces as text: a character that several pieces share stands with the last of them."""
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        return tuple(reader.decode(piece) for piece in self.pieces)


class Keeper:
    """Keeps the profile of a run's stages in its folder: what `evaluate` calls when a stage is paid. A score whose
    profile is not there is forgotten, so that it is made again."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.profile = read_profile(run.path(".")) if run.folder is not None else None
        for fact in [name for name in run.facts if name.startswith("score_")]:
            if not self._has(fact.removeprefix("score_"), run.facts[fact]):
                del run.facts[fact]

    def _has(self, stage: str, booked: Mapping[str, Any]) -> bool:
        """Whether what a stage paid is kept, of the text and the file that were booked."""
        if self.profile is None or stage not in self.profile.stages:
            return False
        kept = (self.profile.text_sha256, self.profile.stages[stage].artifact_sha256)
        return kept == (booked.get("text_sha256"), booked.get("artifact_sha256"))

    def __call__(self, stage: str, ledger: Ledger, held_out: Tokens, lengths: Ints, artifact: Artifact) -> None:
        """Takes up what a settled ledger holds; on every rank, and the first one writes.

        lengths: (N,) bytes of each target.
        """
        profile = self.profile
        if profile is None or profile.text_sha256 != held_out.text_sha256:
            profile = outline(np.asarray(held_out.tokens), lengths, artifact, held_out.text_sha256)
        mine = np.nan_to_num(ledger.price(slice(None))) / np.log(2)
        parts = [_documents(mine, profile), _buckets(mine, lengths, profile), mine[: len(profile.sample)]]
        ranks = self.run.ranks
        whole = [ranks.sum_(torch.from_numpy(part.copy()).to(ranks.device)).cpu().numpy() for part in parts]
        profile.stages[stage] = Bits(whole[0], whole[1], whole[2], artifact.sha256)
        self.profile = profile
        if self.run.writes:
            files.write(self.run.path(PROFILE), packed(profile))


def outline(tokens: npt.NDArray[Any], lengths: Ints, artifact: Artifact, text_sha256: str) -> Profile:
    """The parts of a text, without what they cost. tokens: (N + 1,), lengths: (N,) bytes of each target."""
    targets = tokens[1:]
    first = np.unique(np.append(0, np.flatnonzero(targets == artifact.tokenizer.bos)))
    counts = np.diff(np.append(first, len(targets)))
    places = _places(lengths)
    shares = [np.bincount(places), np.bincount(places, lengths).astype(np.int64)]
    sample = targets[:SAMPLE].astype(np.int64)
    pieces = [artifact.tokenizer.decode([token], previous=tokens[: i + 1]) for i, token in enumerate(sample)]
    documents = np.stack([first, counts, np.add.reduceat(lengths, first)]).astype(np.int64)
    return Profile(text_sha256, int(lengths.sum()), documents, np.stack(shares), sample, tuple(pieces))


def _places(lengths: Ints) -> Ints:
    """(N,) the bucket of each target: the one that its first byte lies in. Fewer buckets where targets are few."""
    count = min(BUCKETS, len(lengths))
    begins: Ints = np.cumsum(lengths) - lengths
    return np.minimum(begins * count // max(int(lengths.sum()), 1), count - 1)


def _documents(bits: Floats, profile: Profile) -> Floats:
    summed: Floats = np.add.reduceat(bits, profile.documents[0])
    return summed


def _buckets(bits: Floats, lengths: Ints, profile: Profile) -> Floats:
    summed: npt.NDArray[Any] = np.bincount(_places(lengths), bits, profile.buckets.shape[1])
    return summed


def packed(profile: Profile) -> bytes:
    """A profile as the bytes of an .npz."""
    told = {
        "text_sha256": profile.text_sha256,
        "text_bytes": profile.text_bytes,
        "files": {stage: bits.artifact_sha256 for stage, bits in profile.stages.items()},
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        "told": np.frombuffer(json.dumps(told).encode(), np.uint8),
        "documents": profile.documents,
        "buckets": profile.buckets,
        "sample": np.stack([profile.sample, [len(piece) for piece in profile.pieces]]),
        "pieces": np.frombuffer(b"".join(profile.pieces), np.uint8),
    }
    for stage, bits in profile.stages.items():
        parts = {"documents": bits.documents, "buckets": bits.buckets, "sample": bits.sample}
        arrays |= {f"{stage}_{name}": part for name, part in parts.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_profile(folder: Path) -> Profile | None:
    """The profile of a run; None where there is none (runs from before it was kept). DataError where it is damaged."""
    path = folder / PROFILE
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(files.read(path)), allow_pickle=False) as kept:
            return _opened({name: kept[name] for name in kept.files})
    except (BadZipFile, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else error
        remedy = f"take it away, and `fairway score {folder}` writes it again"
        raise DataError(f"{path}: no profile of a score ({told}); {remedy}") from error


def _opened(arrays: Mapping[str, npt.NDArray[Any]]) -> Profile:
    told = json.loads(arrays["told"].tobytes())
    sample, ends = arrays["sample"][0], np.cumsum(arrays["sample"][1])
    text = arrays["pieces"].tobytes()
    pieces = tuple(text[end - size : end] for end, size in zip(ends, arrays["sample"][1], strict=True))
    stages = {
        stage: Bits(arrays[f"{stage}_documents"], arrays[f"{stage}_buckets"], arrays[f"{stage}_sample"], digest)
        for stage, digest in told["files"].items()
    }
    documents, buckets = arrays["documents"], arrays["buckets"]
    for stage, bits in stages.items():
        if (bits.documents.shape, bits.buckets.shape) != (documents.shape[1:], buckets.shape[1:]):
            raise ValueError(f"{stage}: {bits.documents.shape} documents, the text has {documents.shape[1:]}")
    return Profile(told["text_sha256"], told["text_bytes"], documents, buckets, sample, pieces, stages)
