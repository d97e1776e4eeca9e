"""What a score leaves behind for those who check it: the price of every target."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fairway.base import files
from fairway.base.journal import Run
from fairway.score.ledger import Ledger

PRICES = "prices.npy"


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether prices are kept: in a run folder."""
    return "train" in recipe


def write_prices(run: Run, ledger: Ledger) -> None:
    """What every target cost, (N,) float32 nats, as prices.npy in the run folder."""
    whole, buffer = ledger.whole(run.ranks), io.BytesIO()
    if run.writes:
        np.save(buffer, whole)
        files.write(run.path(PRICES), buffer.getvalue())


def read_prices(folder: Path) -> np.ndarray[tuple[int], np.dtype[np.float32]] | None:
    """The prices of a run's result, (N,) float32; None where there are none."""
    path = folder / PRICES
    return np.load(path, allow_pickle=False) if path.exists() else None
