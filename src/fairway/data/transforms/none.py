"""The text as it is."""

from dataclasses import dataclass

SYMBOLS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """Nothing to choose."""


def apply(text: str) -> str:
    """The text itself."""
    return text
