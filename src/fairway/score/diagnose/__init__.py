"""What dishonest scoring would claim on a run: the field's known ways, really done on the run's own model.

None of it is a score. Each variant's bits per byte are added up outside every ledger, beside the honest figure of the
same positions in the same windows; then it is put before the instruments, and those that catch it are named. So the
variants are the positive controls of the tape, the ledger, the probe, the sum and the byte oracle. Each procedure names
its sources, pull requests of openai/parameter-golf.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fairway.artifact import open_artifact
from fairway.base.devices import Device
from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.data import Tokens
from fairway.score.diagnose.accounts import DuplicatedTails, InflatedBytes
from fairway.score.diagnose.instruments import verdicts
from fairway.score.diagnose.ngrams import GoldNgram, OracleGate
from fairway.score.diagnose.passes import BestAveraging, BestOfPasses, Pretrained, Rescored, Temperature
from fairway.score.diagnose.scene import Adapted, Procedure, Scene, Sliding, claim
from fairway.score.diagnose.shifts import SlotBatch, SlotSample
from fairway.score.evaluate import byte_lengths
from fairway.score.spec import ScoreSpec

__all__ = ["PROCEDURES", "Variant", "diagnose"]

PROCEDURES: tuple[type[Procedure], ...] = (
    Rescored,
    Temperature,
    SlotBatch,
    SlotSample,
    Pretrained,
    BestOfPasses,
    OracleGate,
    GoldNgram,
    BestAveraging,
    DuplicatedTails,
    InflatedBytes,
)


@dataclass(frozen=True)
class Variant:
    """One dishonest way and what it would claim: not a score.

    charge: what is wrong, in a sentence; honest_bits_per_byte: the same positions, paid once, before they are learned
    from; caught_by: of the instruments tape, ledger, probe, normalised, bytes; evidence: what each of them saw.
    """

    name: str
    charge: str
    claimed_bits_per_byte: float
    honest_bits_per_byte: float
    caught_by: tuple[str, ...]
    evidence: tuple[str, ...]


def diagnose(
    path: Path,
    held_out: Tokens,
    spec: ScoreSpec,
    run: Run,
    tokens: int = 4096,
    seed: int = 0,
    device: Device | None = None,
) -> tuple[Variant, ...]:
    """Every variant on the first `tokens` targets of a text, with the model of the file at `path`.

    Windows slide, as the run's do (of a quarter of the context where its own do not overlap); adaptation is the run's
    test-time training, its chunks shortened to an eighth of the text, compared with the honest one of the same chunks.
    Raises DataError as `evaluate` does, RecipeError for fewer tokens than can be looked at.
    """
    artifact = open_artifact(path)
    targets = min(tokens, len(byte_lengths(artifact, held_out)))
    scene = Scene.of(artifact, spec, device)
    if targets <= scene.windows.stride:
        raise RecipeError(f"diagnose: {targets} tokens; more than a stride of {scene.windows.stride} are needed")
    text, found = np.array(held_out.read(0, targets + 1)), list[Variant]()
    with run.meter("diagnose", len(PROCEDURES), "variants") as meter:
        honest = {kind.stage: claim(kind, scene, text).bits_per_byte for kind in (Sliding, Adapted)}
        for kind in PROCEDURES:
            claimed = claim(kind, scene, text)
            caught = tuple(verdicts(kind, claimed, scene, text, seed))
            names, evidence = tuple(name for name, _ in caught), tuple(seen for _, seen in caught)
            found.append(Variant(kind.name, kind.charge, claimed.bits_per_byte, honest[kind.stage], names, evidence))
            run.fact(f"not_a_score_{kind.name}", tokens=targets, variant=asdict(found[-1]))
            meter.update(len(found))
    return tuple(found)
