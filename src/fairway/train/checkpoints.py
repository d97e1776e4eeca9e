"""Checkpoints: everything that the next step depends on, written whole or not at all.

Model, optimisers, average, what looks on, random state, data position (the step: batches are a function of it) and the
clock already spent. A run by step that is killed and resumed ends with the same bits as one never interrupted.
"""

from pathlib import Path
from typing import Any

import torch

from fairway.base import files
from fairway.base.errors import DataError


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes the state atomically."""
    with files.atomic(path) as file:
        try:
            torch.save(state | {"random": torch.get_rng_state()}, file)
        except RuntimeError as error:  # torch hides a full disk behind "unexpected pos 64 vs 0"
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """Reads a state back (tensors and plain values alone: no code is ever loaded) and restores the random state."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        torch.set_rng_state(state["random"].cpu())
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a checkpoint of this version ({reason}); start the run anew") from error
    return state
