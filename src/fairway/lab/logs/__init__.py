"""Where else a run's points and facts go, for those who live there: `--log tensorboard`, `--log wandb`.

Journal and curves are the record; this is a copy of them. A kind is one file of this folder, which alone may import
its package, and is imported only where it was asked for.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.base.progress import Bar
from fairway.base.ranks import Ranks

KINDS = ("tensorboard", "wandb")


class Log(Protocol):
    """What a kind opens for a run folder."""

    def point(self, curve: str, step: int, values: Mapping[str, float]) -> None: ...

    def fact(self, name: str, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class LoggedRun(Run):
    """A run that tells a log, too, whatever it books; on the first rank, which is the one that writes."""

    def __init__(self, folder: Path, ranks: Ranks, quiet: bool, bar: Bar | None, kind: str) -> None:
        super().__init__(folder, ranks, quiet, bar)
        self._log: Log | None = _module(kind).open_log(folder) if self.writes else None

    def fact(self, name: str, **values: Any) -> None:
        super().fact(name, **values)
        if self._log is not None:
            self._log.fact(name, values)

    def point(self, curve: str, step: int, **values: float) -> None:
        super().point(curve, step, **values)
        if self._log is not None:
            self._log.point(curve, step, values)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        super().close()


def check(kind: str) -> None:
    """RecipeError where there is no such log, or where the extra that it needs is missing: before a run begins."""
    module = _module(kind)
    try:
        module.needs()
    except ImportError as error:
        missing = error.name or kind
        raise RecipeError(f"--log {kind} needs the package {missing!r}: pip install 'fairway[{kind}]'") from None


def _module(kind: str) -> Any:
    if kind not in KINDS:
        raise RecipeError(f"--log {kind!r}: no such log; choices: {', '.join(KINDS)}")
    return importlib.import_module(f"{__name__}.{kind}")
