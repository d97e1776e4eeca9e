"""The teller of exact mode."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fairway.base.devices import Device
from fairway.base.journal import Run
from fairway.base.slots import optional
from fairway.score import exact
from fairway.score.ledger import Ledger
from fairway.score.spec import ScoreSpec, Stage
from fairway.score.stream import Index, Stream
from fairway.score.tellers import Listener


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) scores in exact mode."""
    return bool(recipe["score"]["exact"])


def books(
    run: Run,
    ledger: Ledger,
    stream: Stream,
    spec: ScoreSpec,
    stage: Stage,
    device: Device | None,
    text_sha256: str,
    artifact_sha256: str,
) -> Any:
    """The books of an adapted stage of a run that has a folder, else None; says where exact mode computes."""
    if device is not None and device.torch.type != "cpu":
        run.fact("substitution", what=f"{stage} on {device.torch}", why="exact mode is float64 on the CPU, one learner")
    if stage != "adapted" or run.folder is None:
        return None
    keep = optional("fairway.score.booking").Booking
    return keep(run, ledger, stream, spec.snapshots, text_sha256, artifact_sha256)


class Exact:
    """The integer distributions of exact mode: what a coder is driven with, and what a decoder computes again."""

    def __init__(self, temperature: float = 1.0, listen: Listener | None = None) -> None:
        self.temperature, self.listen = temperature, listen

    def price(self, positions: Index, logits: Tensor, targets: Tensor) -> npt.NDArray[np.float64]:
        counts = exact.counts(exact.grid(logits, self.temperature))
        if self.listen is not None:
            self.listen(positions, (torch.as_tensor(counts).double() / exact.TOTAL).log())
        chosen = np.asarray(counts)[np.arange(len(positions)), targets.cpu().numpy()]
        return exact.prices(chosen)
