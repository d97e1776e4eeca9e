"""Which tensor goes on which grid: defaults by role, overrides by part and layers.

[quant.matrix]
bits = 5
scale = {rule = "percentile", floor = 0.0}
[[quant.override]]
parts = ["v", "o", "up", "down"]
layers = [2, 8]                       # first and last
bits = 4
form = "turbo"                        # what codes stand for: FORMS
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from fairway.base import slots
from fairway.base.errors import RecipeError
from fairway.base.specs import choice
from fairway.model import GPT, Tag, tags
from fairway.quant.dead_zone import refuse_width
from fairway.quant.grid import LEAST_BITS, MOST_BITS
from fairway.quant.pruning import PruneSpec
from fairway.quant.repair import RepairSpec
from fairway.quant.scales import ScaleSpec

FLOAT16 = 16  # bits: not quantised, stored as float16
Form = Literal["steps", "lloyd_max", "rotated", "turbo"]
"""steps: equal ones; lloyd_max: the 2^bits levels of the best quantiser of a normal, scaled by a row's root mean square
and not as `scale` says; rotated: steps, of rows that are rotated at random; turbo: levels, of such rows (books.py)."""


def _refuse_bits(bits: int) -> None:
    if bits != FLOAT16 and not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"bits = {bits}: {LEAST_BITS} to {MOST_BITS}, or {FLOAT16} for float16")


@dataclass(frozen=True)
class GridSpec:
    """The grid of a role's tensors."""

    bits: int = 5  # 2 … 8; 16: float16, not quantised
    scale: ScaleSpec = field(default_factory=ScaleSpec)
    dead_zone: float = 0.0  # of a step, in [0, 0.5): how far every threshold of rounding moves away from zero
    form: Form = "steps"  # what codes stand for

    def __post_init__(self) -> None:
        _refuse_bits(self.bits)
        refuse_width(self.dead_zone)


@dataclass(frozen=True)
class Override:
    """Another grid for some parts of some layers; what is left out stays as it was. Later overrides win."""

    parts: tuple[str, ...]  # "q", "k", "v", "o", "up", "down", "embedding", "bigram", …: tags of the model
    layers: tuple[int, int] | None = None  # first and last, both included; left out: everywhere
    bits: int | None = None
    scale: ScaleSpec | None = None
    dead_zone: float | None = None
    form: Form | None = None

    def __post_init__(self) -> None:
        if self.bits is not None:
            _refuse_bits(self.bits)
        if self.dead_zone is not None:
            refuse_width(self.dead_zone)
        if self.layers is not None and self.layers[0] > self.layers[1]:
            raise ValueError(f"layers = {list(self.layers)}: the first layer and the last are needed, in order")

    def covers(self, tag: Tag) -> bool:
        here = self.layers is None or (tag.layer is not None and self.layers[0] <= tag.layer <= self.layers[1])
        return here and tag.part in self.parts

    def change(self, grid: GridSpec) -> GridSpec:
        dead_zone = grid.dead_zone if self.dead_zone is None else self.dead_zone
        return GridSpec(self.bits or grid.bits, self.scale or grid.scale, dead_zone, self.form or grid.form)


@dataclass(frozen=True)
class FitSpec:
    """Grids found for a byte budget, in the place of those that are named: bits, clips and dead zones of every tensor,
    and whether repair pays. Reads Hessians, no text."""

    budget: int = 0  # bytes of the artifact; 0: no fit, the grids are as they are named
    code: bool = False  # the exported script is to fit in as well

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ValueError(f"budget = {self.budget}: a number of bytes is needed, or 0 for no fit")


@dataclass(frozen=True)
class QuantSpec:
    """From weights to integers."""

    matrix: GridSpec = field(default_factory=GridSpec)
    table: GridSpec = field(default_factory=lambda: GridSpec(bits=8, scale=ScaleSpec(rule="fixed")))
    override: tuple[Override, ...] = ()
    rounding: Any = choice("fairway.quant.rounding", "gptq")  # of matrices; tables are rounded to nearest
    embedding_hessian: bool = False  # the tied embedding too is rounded by `rounding`, with the head's Hessian
    prune: PruneSpec = field(default_factory=PruneSpec)
    repair: RepairSpec = field(default_factory=RepairSpec)
    fit: FitSpec = field(default_factory=FitSpec)
    passthrough_elements: int = 0  # tensors of at most so many numbers stay float16; the reference: 65,536
    calibration: Any = choice("fairway.quant.calibration", "text")  # where Hessians come from
    calibration_sequences: int = 256  # of training text, over all ranks: what the source `text` reads
    calibration_batch: int = 8  # sequences in one forward

    def __post_init__(self) -> None:
        for name in ("calibration_sequences", "calibration_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        if self.prune.budget and self.fit.budget:
            raise ValueError("prune.budget and fit.budget: two ways to meet one; leave one out")
        if self.table.scale.hessian_weight and not self.embedding_hessian:
            raise ValueError("table.scale.hessian_weight: tables have no Hessian; set embedding_hessian, or take 0")
        if shaped(self.matrix, self.table, *self.override):
            slots.optional("fairway.quant.books").check_spec(self)


def shaped(*grids: GridSpec | Override) -> bool:
    """Whether the codes of one of them stand for something else than steps."""
    return not {grid.form for grid in grids} <= {"steps", None}


def needs_hessians(spec: QuantSpec) -> bool:
    """Whether anything in the plan reads Hessians: its rounding, clips, pruning or repair."""
    scales = [spec.matrix.scale, *(override.scale for override in spec.override if override.scale is not None)]
    return (
        slots.module_of(spec.rounding).NEEDS_HESSIAN
        or any(scale.hessian_weight for scale in scales)
        or (spec.prune.when == "selective" and spec.prune.by != "scale")
        or (spec.repair.kind != "none" and spec.repair.weighting == "hessian")
    )


def plan(model: GPT, spec: QuantSpec) -> dict[str, GridSpec | None]:
    """The grid of every parameter; None: float16. RecipeError for an override that names nothing in this model."""
    found = tags(model)
    _refuse_idle(spec.override, found.values())
    planned: dict[str, GridSpec | None] = {}
    for name, parameter in model.named_parameters():
        grid = _grid(found[name], spec)
        small = parameter.numel() <= spec.passthrough_elements
        planned[name] = grid = None if grid is None or small or grid.bits == FLOAT16 else grid
        if grid and shaped(grid):
            slots.optional("fairway.quant.books").check(name, grid, parameter.shape[1])
    return planned


def _grid(tag: Tag, spec: QuantSpec) -> GridSpec | None:
    if tag.role not in ("matrix", "table"):
        return None
    grid = spec.matrix if tag.role == "matrix" else spec.table
    for override in spec.override:
        if override.covers(tag):
            grid = override.change(grid)
    return grid


def _refuse_idle(overrides: Iterable[Override], found: Iterable[Tag]) -> None:
    quantised = [tag for tag in found if tag.role in ("matrix", "table")]
    parts = sorted({tag.part for tag in quantised})
    for i, override in enumerate(overrides):
        unknown = sorted(set(override.parts) - set(parts))
        if unknown:
            raise RecipeError(
                f"quant.override[{i}].parts = {unknown[0]!r}: not in this model; parts: {', '.join(parts)}"
            )
        if not any(override.covers(tag) for tag in quantised):
            raise RecipeError(f"quant.override[{i}].layers = {override.layers}: no such layer has these parts")
