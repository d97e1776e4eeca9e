"""Weights & Biases (extra `wandb`): offline, in the run folder; `wandb sync RUN/wandb/offline-run-*` sends it.

Nothing leaves the machine unless its owner says so: with WANDB_MODE=online in the environment it is sent as it is made.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def needs() -> None:
    """ImportError where the extra is missing."""
    import wandb  # noqa: F401


class Log:
    """Curves as history, facts as the summary."""

    def __init__(self, folder: Path) -> None:
        import wandb

        folder = folder.resolve()
        mode: Any = None if "WANDB_MODE" in os.environ else "offline"
        settings = wandb.Settings(silent=True, console="off")
        self.run = wandb.init(
            project="fairway",
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=folder,
            mode=mode,
            settings=settings,
        )

    def point(self, curve: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{curve}/{name}": value for name, value in values.items()}, step=step)

    def fact(self, name: str, values: Mapping[str, Any]) -> None:
        self.run.summary[name] = dict(values)

    def close(self) -> None:
        self.run.finish()


def open_log(folder: Path) -> Log:
    return Log(folder)
