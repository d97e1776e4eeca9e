"""Training text (GPTQ, arXiv 2210.17323): the first windows of it, on the trained model, inside the training clock.

How many: `quant.calibration_sequences`, divided over the ranks. The reference read the same 256 on every rank (#576).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fairway.base.journal import Run
from fairway.model import GPT
from fairway.quant.observe import Hessians, gather

ON_CLOCK = True


@dataclass(frozen=True)
class Spec:
    pass


def observer(quant: Any, model: GPT, names: Collection[str], run: Run) -> None:
    """Nothing is gathered while training."""


def hessians(
    quant: Any, model: GPT, names: Collection[str], windows: Iterable[Tensor], run: Run, seed: int
) -> Hessians:
    return gather(model, windows, names, run, quant.calibration_sequences) if names else {}
