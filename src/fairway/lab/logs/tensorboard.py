"""TensorBoard's event files, in the run folder: tensorboard --logdir runs (extra `tensorboard`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


def needs() -> None:
    """ImportError where the extra is missing."""
    import torch.utils.tensorboard  # noqa: F401


class Log:
    """Curves as scalars, the stages' scores too, and every fact as text."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / FOLDER), flush_secs=10)
        self.step = 0

    def point(self, curve: str, step: int, values: Mapping[str, float]) -> None:
        self.step = step
        for name, value in values.items():
            self.writer.add_scalar(f"{curve}/{name}", value, step)

    def fact(self, name: str, values: Mapping[str, Any]) -> None:
        if name.startswith("score_") and "bits_per_byte" in values:
            self.writer.add_scalar(f"bits_per_byte/{name.removeprefix('score_')}", values["bits_per_byte"], self.step)
        said = json.dumps(values, indent=2, default=str)
        self.writer.add_text(name, "".join(f"    {line}\n" for line in said.splitlines()), self.step)

    def close(self) -> None:
        self.writer.close()


def open_log(folder: Path) -> Log:
    return Log(folder)
