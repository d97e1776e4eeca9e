"""Proof: a score is the size of a file that decodes.

The beginning of the held-out text is written as a real file, in the very order in which it was scored, and decoded by
another process that is given the artifact and this file, nothing else; the bytes are compared.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fairway.artifact import open_artifact
from fairway.base import files
from fairway.base.clock import Stopwatch
from fairway.base.errors import FairwayError, HonestyError, RecipeError
from fairway.base.journal import Run
from fairway.data import Tokens
from fairway.score import range_coder
from fairway.score.codec.files import assemble, encoding
from fairway.score.codec.format import Segment
from fairway.score.codec.jobs import run_jobs
from fairway.score.evaluate import StageScore, byte_lengths, stream_of
from fairway.score.spec import ScoreSpec
from fairway.score.stream import Stream

PROOF = "proof.fwc"
Prices = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Proof:
    """What the proof of a slice saw; the object that `fairway prove --json` prints.

    bits_per_byte = 8 · file_bytes / text_bytes; ideal_bits: Σ −log2 of the float64 softmax before the grid, of the
    same tokens; coded_bits: the same of the integer distributions; gap_percent: of the whole file over ideal_bits;
    scored_bits: what the score booked for these tokens (in the type `scored_as`), null where it is not known.
    """

    decoded_equal: bool
    file_bytes: int
    text_bytes: int
    bits_per_byte: float
    ideal_bits: float
    coded_bits: float
    gap_percent: float
    framing_bytes: int
    tokens: int
    of_tokens: int
    updates: int
    seconds: float
    encode_seconds: float
    decode_seconds: float
    stage: str
    scored_bits: float | None
    scored_as: str | None
    scored_gap_percent: float | None  # coded_bits over scored_bits
    artifact_sha256: str
    text_sha256: str

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def prove(
    path: Path,
    held_out: Tokens,
    spec: ScoreSpec,
    run: Run,
    slice_bytes: int = 0,
    scored: StageScore | None = None,
    prices: Prices | None = None,
) -> Proof:
    """Proves the first `slice_bytes` of the text (0: all of it), at the stage that `spec` names as the result.

    scored, prices: what the score booked for every target, to be compared. HonestyError where the decoded bytes are
    others, the decoder refuses the file, or the file needs other bits than were booked; ArtifactError, DataError: as in
    scoring; FairwayError: the process that decodes was ended from outside.
    """
    watch = Stopwatch().start()
    artifact = open_artifact(path)
    lengths = byte_lengths(artifact, held_out)
    context = spec.context or artifact.model_spec.context
    stream, taken = slice_of(lengths, spec, context, slice_bytes)
    tokens = np.concatenate([held_out.tokens[:1], held_out.tokens[1 + taken]])
    # The text itself, as byte_lengths has checked; but the lanes' pieces are joined where the text was not, and some
    # tokenizers drop the space after a document's beginning.
    expected = artifact.tokenizer.decode(tokens[1:], previous=int(tokens[0]))
    block = max(1, 32_000 * len(taken) // max(len(expected), 1))
    with Stopwatch() as writing:
        job = encoding(tokens, spec, spec.result, block, stream.whole)
        encoded = list(run_jobs(artifact, [job], run, "prove: encode"))
        coded = assemble(artifact, [Segment(len(expected), (encoded[0].part,))], encoded, spec, spec.result)
    if stream.lanes == 1 and not held_out.text.startswith(expected):
        raise HonestyError("proof: the tokens of the slice are not the beginning of the text; this is no score")
    if range_coder.name() != "constriction":
        run.fact("substitution", what="range coder", why="constriction is not installed: the one in Python")
    with Stopwatch() as decoding:
        decoded = decode_elsewhere(path, coded.content, run)
    if decoded != expected:
        at = next((i for i, (a, b) in enumerate(zip(decoded, expected, strict=False)) if a != b), len(decoded))
        raise HonestyError(
            f"proof: decoded to other bytes than the text from byte {at:,} of {len(expected):,} on; this is no score"
        )
    if run.writes:
        files.write(run.path(PROOF), coded.content)
    booked = _booked_bits(scored, prices, taken, coded.coded_bits)
    return Proof(
        decoded_equal=decoded == expected,
        file_bytes=len(coded.content),
        text_bytes=len(expected),
        bits_per_byte=8 * len(coded.content) / len(expected),
        ideal_bits=coded.ideal_bits,
        coded_bits=coded.coded_bits,
        gap_percent=100 * (8 * len(coded.content) / coded.ideal_bits - 1),
        framing_bytes=coded.framing_bytes,
        tokens=len(taken),
        of_tokens=stream.whole,
        updates=coded.updates,
        seconds=round(watch.stop(), 3),
        encode_seconds=round(writing.seconds, 3),
        decode_seconds=round(decoding.seconds, 3),
        stage=spec.result,
        scored_bits=booked,
        scored_as=("exact " if scored.exact else "") + scored.compute if scored and booked is not None else None,
        scored_gap_percent=100 * (coded.coded_bits / booked - 1) if booked else None,
        artifact_sha256=artifact.sha256,
        text_sha256=held_out.text_sha256,
    )


def _booked_bits(
    scored: StageScore | None, prices: Prices | None, taken: npt.NDArray[np.int64], coded_bits: float
) -> float | None:
    """What the score booked for the tokens that were decoded; None where its prices are not at hand.

    HonestyError where the prices do not add up to the score, or the file needs more or less than was booked: a score
    that no file can have. In exact mode both are the same sum (prices are kept as float32). Else rounding to the grid
    moves a price by 0.0065 bits, at random, and other types move them all a little: half a percent is allowed.
    """
    if scored is None or prices is None:
        return None
    if len(prices) != scored.tokens:
        raise HonestyError(f"proof: {len(prices):,} prices for a score of {scored.tokens:,} tokens; this is no score")
    whole = float(prices.sum(dtype=np.float64) / np.log(2))
    if abs(whole - scored.code_length_bits) > 1e-6 * scored.code_length_bits + 1e-3:
        raise HonestyError(
            f"proof: the prices of all tokens come to {whole:.3f} bits, the score to {scored.code_length_bits:.3f}; "
            "this is no score"
        )
    bits = float(prices[taken].sum(dtype=np.float64) / np.log(2))
    allowed = 1e-6 * bits + 1e-3 if scored.exact else 0.005 * bits + 4 * 0.0065 * len(taken) ** 0.5
    if not abs(coded_bits - bits) <= allowed:
        raise HonestyError(
            f"proof: these tokens cost {coded_bits:.3f} bits, {bits:.3f} were booked for them; more than "
            f"{allowed:.3f} apart: this is no score"
        )
    return bits


def slice_of(
    lengths: npt.NDArray[np.int64], spec: ScoreSpec, trained_context: int, slice_bytes: int
) -> tuple[Stream, npt.NDArray[np.int64]]:
    """The stream of the first tokens that hold at least `slice_bytes` (0: of all), with the whole text's lengths and
    schedule, and which targets they are: with lanes the first of every lane."""
    whole = len(lengths)
    if slice_bytes < 0:
        raise RecipeError(f"slice of {slice_bytes} bytes: a positive number is expected")
    if not slice_bytes or slice_bytes >= int(lengths.sum()):
        stream = stream_of(spec.result, whole, spec, trained_context)
        return stream, stream.taken
    targets = max(1, round(whole * slice_bytes / int(lengths.sum())))
    while True:
        stream = stream_of(spec.result, targets, spec, trained_context, whole)
        taken = stream.taken
        held = int(lengths[taken].sum())
        if held >= slice_bytes or targets == whole:
            return stream, taken
        targets = min(whole, targets + max(1, round((slice_bytes - held) * targets / max(held, 1))))


def decode_elsewhere(artifact: Path, content: bytes, run: Run, verb: str = "decompress", **more: bytes) -> bytes:
    """What another process makes of a compressed file, in an empty folder that holds a copy of the artifact and this
    file alone (and what `more` names, each given as an option). HonestyError with its last line where it fails."""
    with tempfile.TemporaryDirectory(prefix="fairway-proof-") as folder:
        place = Path(folder)
        shutil.copyfile(artifact, place / "artifact.fw")
        (place / "text.fwc").write_bytes(content)
        command = [sys.executable, "-m", "fairway", verb, "text.fwc", "-a", "artifact.fw", "-o", "text"]
        for name, extra in more.items():
            (place / name).write_bytes(extra)
            command += [f"--{name}", name]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("FAIRWAY", "XDG_"))}
        environment |= {"HOME": folder, "TMPDIR": folder, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        shown = subprocess.PIPE if run.quiet else None
        done = subprocess.run(command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=shown)
        if done.returncode:
            said = (done.stderr or b"").decode(errors="replace").strip().splitlines() or ["its reason stands above"]
            if done.returncode < 0 or said[-1].startswith("FairwayError"):  # killed, or no room on the disk
                why = said[-1] if done.returncode > 0 else f"signal {-done.returncode}"
                raise FairwayError(
                    f"proof: the process that decodes was ended ({why}); nothing is shown, prove it again"
                )
            raise HonestyError(f"proof: the file does not decode in another process ({said[-1]}); this is no score")
        return (place / "text").read_bytes()
