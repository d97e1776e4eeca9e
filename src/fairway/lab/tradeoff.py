"""The trade-off of a fit as a picture: bytes against damage, and against bits per byte of training text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fairway.base import files


class Place(Protocol):
    @property
    def bytes(self) -> float: ...
    @property
    def damage(self) -> float: ...


def draw(path: Path, points: Sequence[Place], scored: Sequence[float], landed: int, budget: int) -> bool:
    """Writes an SVG; False where matplotlib is missing. scored: bits per byte at each point, or none."""
    try:
        import matplotlib
    except ImportError:
        return False
    from matplotlib.figure import Figure

    sizes = [point.bytes / 1000 for point in points]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot(sizes, [point.damage for point in points], "o-", color="#1f5582", label="expected damage")
    axes.set(xscale="log", yscale="log", xlabel="artifact, KB", ylabel="damage, nats per token")
    axes.axvline(budget / 1000, color="#888888", linestyle=":", label=f"budget {budget:,} bytes")
    axes.axvline(landed / 1000, color="#c1440e", linewidth=1, label=f"file {landed:,} bytes")
    if scored:
        right = axes.twinx()
        right.plot(sizes, scored, "s--", color="#5a8a3c", label="training text")
        right.set(ylabel="bits per byte of training text")
        right.legend(loc="lower left")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": "fairway", "svg.fonttype": "none"}), files.atomic(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
    return True
