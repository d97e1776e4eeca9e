"""How far a stage is, and whether it will be late."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fairway.base.clock import Stopwatch, hold
from fairway.base.progress import Meter
from fairway.base.ranks import Ranks
from fairway.score.evaluate import REMEDY
from fairway.score.ledger import Ledger
from fairway.score.spec import Stage
from fairway.score.stream import Unit


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a stage has a limit: in a run, not where a file is only scored."""
    return "train" in recipe


class Pace:
    """Shows how far a stage is, and stops it on all ranks as soon as it is sure to be late."""

    def __init__(
        self,
        stage: Stage,
        ledger: Ledger,
        lengths: npt.NDArray[np.int64],
        limit: float,
        watch: Stopwatch,
        ranks: Ranks,
        meter: Meter,
    ) -> None:
        self.stage, self.ledger, self.lengths = stage, ledger, lengths
        self.limit, self.watch, self.ranks, self.meter = limit, watch, ranks, meter
        self.units = 0
        self.settling = (0.0, 0)  # seconds and targets of the first unit: compilers and caches warm up in it
        self.nats, self.bytes = 0.0, 0

    def __call__(self, unit: Unit) -> None:
        """unit: this rank's share of a unit that has just been paid."""
        self.units += 1
        positions = unit.windows.positions
        self.nats += float(self.ledger.price(positions).sum())
        self.bytes += int(self.lengths[positions].sum())
        seconds = self.watch.seconds
        self.meter.update(unit.done, bpb=self.nats / np.log(2) / max(self.bytes, 1))
        if self.units == 1:
            self.settling = (seconds, unit.done)
        warm, done = self.settling
        if self.limit and self.units > 3 and unit.done > done:
            left = (seconds - warm) / (unit.done - done) * (len(self.ledger) - unit.done)
            # 5 % of what is left is forgiven, since rates vary; the exact time is asserted at the end.
            hold(f"{self.stage} score, projected", seconds + 0.95 * left, self.limit, "s", REMEDY, self.ranks)
