"""Any bytes -> a smaller file, and back, with an artifact as the model."""

import platform
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fairway.artifact import Artifact
from fairway.base.errors import ArtifactError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import build, to_plain
from fairway.score.adapt import none
from fairway.score.codec import limits
from fairway.score.codec.format import Header, Segment, pack, read_header, read_segments, shown
from fairway.score.codec.jobs import Job, run_jobs
from fairway.score.codec.part import Encoded, decode_part, encode_part, learns_in, trial
from fairway.score.spec import ScoreSpec, Stage, spec_of
from fairway.score.stream import edges_of
from fairway.score.windows import rolling

SEGMENT = 1_000_000  # bytes of text in a segment
MOST_ADAPTED = 1 << 26  # bytes of text in an adapted file, which is one segment: days of work
BLOCK_BYTES = 32_000  # of text between two checks, about
# A lane begins without context: lanes of 11 contexts cost 0.19 % more than one lane (pocket), 28 contexts 0.05 %.
LANE_CONTEXTS = 16
LANES, GROUPS = 32, 2
BYTES_PER_TOKEN = 3  # about, to choose the number of lanes by
_NEEDED = ("context", "windows", "adapt", "reshape", "temperature")  # what a decoder must know of the score's settings


@dataclass(frozen=True)
class Coded:
    """A compressed text and what was measured on the way. Bits: see Encoded."""

    content: bytes
    text_bytes: int
    tokens: int
    ideal_bits: float
    coded_bits: float
    word_bytes: int
    framing_bytes: int
    updates: int


def settings_for(artifact: Artifact, adapt: bool, lanes: int = 0, text_bytes: int = SEGMENT) -> ScoreSpec:
    """How `compress` reads a text: rolling windows, learning from it as the artifact's own recipe does where `adapt`.

    lanes: 0: as many as a text of `text_bytes` has room for, 32 at most; one where the model learns, which does so
    from longer stretches then. RecipeError where the artifact names no adaptation, or lanes do not go with it.
    """
    own = spec_of(artifact)
    if adapt and not own.adapts:
        raise RecipeError(
            f"{artifact.path}: names no adaptation; leave --adapt out, or take an artifact whose recipe does"
        )
    context = own.context or artifact.model_spec.context
    room = min(text_bytes, SEGMENT) // (BYTES_PER_TOKEN * LANE_CONTEXTS * context)
    try:
        if adapt:
            spec = replace(own, result="adapted", lanes=lanes or 1)
        else:
            spec = replace(own, result="sliding", adapt=none.Spec(), lanes=lanes or max(1, min(LANES, room)))
        within = adapt and not own.adapt.chunk  # it learns from a window's context, which rolling windows have not
        return replace(spec, windows=own.windows if within else rolling.Spec(), exact=False, snapshots=0)
    except ValueError as error:
        raise RecipeError(f"--lanes: {error}") from error


def compress(
    artifact: Artifact, text: bytes, spec: ScoreSpec, run: Run | None = None, groups: int = GROUPS, processes: int = 1
) -> Coded:
    """Any bytes as a file that `decompress` turns back into them. groups: range coders of a segment;
    processes: at most so many work on them, 0: one for each core (a program that asks for more than one must keep its
    main module importable, as the standard library's multiprocessing says)."""
    stage, run = spec.result, run or Run()
    if stage == "adapted" and len(text) > MOST_ADAPTED:
        raise RecipeError(
            f"text of {len(text):,} bytes: at most {MOST_ADAPTED:,} can be coded with --adapt; leave it out"
        )
    each = len(text) if stage == "adapted" else SEGMENT
    texts = [text[begin : begin + each] for begin in range(0, len(text), each or 1)]
    jobs, owners = [], []
    for number, part in enumerate(texts):
        tokens = artifact.tokenizer.encode_exactly(part)
        for piece, lanes in _groups(len(tokens), spec.lanes, 1 if stage == "adapted" else groups):
            own = np.concatenate([[artifact.tokenizer.bos], tokens[piece]]).astype(np.uint16)
            block = max(1, round(BLOCK_BYTES * len(tokens) / len(part)))
            jobs.append(encoding(own, replace(spec, lanes=lanes), stage, block))
            owners.append(number)
    encoded = list(run_jobs(artifact, jobs, run, "compress", processes))
    segments = [
        Segment(len(part), tuple(one.part for one, owner in zip(encoded, owners, strict=True) if owner == number))
        for number, part in enumerate(texts)
    ]
    return assemble(artifact, segments, encoded, spec, stage)


def encoding(tokens: npt.NDArray[Any], spec: ScoreSpec, stage: Stage, block: int, whole: int = 0) -> Job:
    """The work of encoding one part."""
    return Job(encode_part, (tokens, spec, stage, block, whole), len(tokens) - 1)


def assemble(
    artifact: Artifact,
    segments: list[Segment],
    encoded: list[Encoded],
    spec: ScoreSpec,
    stage: Stage,
    chunk: int | None = None,
) -> Coded:
    """The file of parts that are encoded. chunk: see Header."""
    text_bytes = sum(segment.text_bytes for segment in segments)
    learns = chunk is None and any(one.updates for one in encoded)
    header = Header(
        artifact=artifact.sha256,
        settings=_differences(to_plain(spec), to_plain(spec_of(artifact))),
        stage=stage,
        text_bytes=text_bytes,
        segments=len(segments),
        machine=trial(artifact, spec) if learns else "",
        wrote=machine() if learns else "",
        chunk=chunk,
    )
    content = pack(header, segments)
    words = sum(len(part.words) for segment in segments for part in segment.parts)
    return Coded(
        content=content,
        text_bytes=text_bytes,
        tokens=sum(one.part.targets for one in encoded),
        ideal_bits=sum(one.ideal_bits for one in encoded),
        coded_bits=sum(one.coded_bits for one in encoded),
        word_bytes=words,
        framing_bytes=len(content) - words,
        updates=sum(one.updates for one in encoded),
    )


def decompress(
    artifact: Artifact, content: bytes, name: str = "file", run: Run | None = None, processes: int = 1
) -> bytes:
    """The text of a compressed file. ArtifactError for a file that is damaged, cut short, of another artifact, or of a
    machine that learns otherwise; nothing is returned then."""
    header, segments, spec = header_of(artifact, content, name)
    try:
        return _decoded(artifact, header, segments, spec, name, run or Run(), processes)
    except (RecipeError, ValueError) as error:  # settings that no encoder would have written; ValueError: torch's word
        raise ArtifactError(f"{name}: header: {shown(error)}") from error


def header_of(artifact: Artifact, content: bytes, name: str) -> tuple[Header, list[Segment], ScoreSpec]:
    """What a file says of itself, checked. ArtifactError where it is damaged, or another artifact's."""
    header, start = read_header(content, name)
    if header.artifact != artifact.sha256:
        raise ArtifactError(
            f"{name}: was compressed with the artifact {header.artifact[:12]}, this one is {artifact.sha256[:12]}; "
            "name the one that wrote it"
        )
    segments = read_segments(content, start, header, name)
    try:
        spec = build(ScoreSpec, _merged(to_plain(spec_of(artifact)), header.settings), "settings")
        stage: Any = header.stage
        for part in (part for segment in segments for part in segment.parts):
            limits.check(spec, stage, artifact.model_spec.context, part.targets, part.whole, part.lanes)
    except (RecipeError, RecursionError) as error:
        raise ArtifactError(f"{name}: header: {shown(error)}") from error
    return header, segments, spec


def machine() -> str:
    """Library and processor, for people: what must be the same where an adapted file is decoded."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"


def _decoded(
    artifact: Artifact, header: Header, segments: list[Segment], spec: ScoreSpec, name: str, run: Run, processes: int
) -> bytes:
    stage: Any = header.stage
    if header.chunk is not None:
        raise ArtifactError(f"{name}: is one chunk of a longer text, written for a proof; it needs the state before it")
    if stage not in ("quantized", "sliding", "adapted"):
        raise ArtifactError(f"{name}: header: stage {stage!r} is unknown")
    learns = any(learns_in(artifact, part, spec, stage, name) for segment in segments for part in segment.parts)
    if learns != bool(header.machine):
        raise ArtifactError(f"{name}: header: the fingerprint of what learned is missing, or not needed")
    if learns and trial(artifact, spec) != header.machine:
        raise ArtifactError(
            f"{name}: was written where learning rounds otherwise ({header.wrote or 'unknown'}; here {machine()}); "
            "decode it there"
        )
    jobs = [
        Job(decode_part, (part, spec, stage, _place(name, number, index, segment)), part.targets)
        for number, segment in enumerate(segments)
        for index, part in enumerate(segment.parts)
    ]
    found = run_jobs(artifact, jobs, run, "decompress", processes)
    texts = []
    for number, segment in enumerate(segments):
        tokens = np.concatenate([np.zeros(0, np.uint16), *(next(found) for _ in segment.parts)])
        text = artifact.tokenizer.decode(tokens, previous=artifact.tokenizer.bos)
        if len(text) != segment.text_bytes:
            raise ArtifactError(
                f"{name}: segment {number}: decodes to {len(text):,} bytes, not {segment.text_bytes:,}; it is damaged"
            )
        texts.append(text)
    return b"".join(texts)


def _place(name: str, number: int, index: int, segment: Segment) -> str:
    return f"{name}: segment {number}" + (f", part {index}" if len(segment.parts) > 1 else "")


def _groups(targets: int, lanes: int, groups: int) -> list[tuple[slice, int]]:
    """Which tokens each range coder writes, and in how many lanes: whole lanes, the remainder to the first."""
    lanes = lanes if lanes <= targets else 1
    edges, shares = edges_of(targets, lanes), edges_of(lanes, min(groups, lanes))
    return [(slice(int(edges[a]), int(edges[b])), int(b - a)) for a, b in pairwise(shares)]


def _differences(table: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What a decoder needs of the settings and the artifact does not say; lanes stand with the parts."""
    return {key: table[key] for key in _NEEDED if table[key] != base[key]}


def _merged(base: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """The artifact's settings under the file's: in the decoder's own words only."""
    unknown = sorted(set(changed) - set(_NEEDED))
    if unknown:
        raise RecipeError(f"settings: {unknown[0]!r} is unknown")
    adapt = changed.get("adapt", base["adapt"])
    adapts = not isinstance(adapt, dict) or adapt.get("kind") != "none"
    return {**base, **changed, "lanes": 1, "exact": False, "snapshots": 0, "result": "adapted" if adapts else "sliding"}
