"""Every coder on the same integers, side by side: bytes, the floor beneath them, seconds.

Two floors stand beside the bytes. `order0` is the entropy of each tensor's codes with their frequencies known for
nothing; coders that look at rows and columns go below it. `model` is what `rans`'s own probabilities say.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fairway.artifact.container import grouped, numbers
from fairway.artifact.groups import Group
from fairway.artifact.header import check_shapes
from fairway.artifact.squeeze import squeeze, unsqueeze
from fairway.base import slots
from fairway.base.clock import Stopwatch
from fairway.base.errors import ContractError
from fairway.base.journal import Run
from fairway.model import ModelSpec
from fairway.quant.grid import Quantized, Tensors, entropy

FOLDER = "fairway.artifact.coder"
PLAIN, NEAR = "(byte coders)", "(rans, context)"


@dataclass(frozen=True)
class Row:
    """One coder on one group, or on all of them together with scales and float16 numbers (group "total").

    bytes: written; order0_bytes: entropy of each tensor's codes alone; model_bytes: the entropy of the coder's own
    model, where it has one (`rans`).
    """

    group: str
    coder: str
    codes: int
    bytes: int
    order0_bytes: float
    model_bytes: float | None
    encode_seconds: float
    decode_seconds: float

    def plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)


def compare(tensors: Tensors, model: ModelSpec, vocab: int, run: Run, coders: Sequence[Any] | None = None) -> list[Row]:
    """Codes every group with every coder and decodes it again.

    coders: Specs of the slot; by default one of each kind, as it comes. Rows stand by group, then by coder; the last
    ones are the totals. ContractError where a coder does not give back what it was given; ArtifactError where the
    tensors are not the model's.
    """
    specs = list(coders) if coders is not None else [_default(kind) for kind in slots.kinds(FOLDER)]
    skeleton = check_shapes(model, vocab, {name: tuple(value.shape) for name, value in tensors.items()})
    groups = list(grouped(tensors, skeleton))
    rows: list[Row] = []
    total, done = len(specs) * sum(group.layout.count for group in groups), 0
    with run.meter("compare", total, "codes") as meter:
        for group in groups:
            for spec in specs:
                rows.append(measured(group, spec))
                done += group.layout.count
                meter.update(done)
    plain, near = _others(tensors, groups, False), _others(tensors, groups, True)
    sections = [near if getattr(slots.module_of(spec), "CODES_NUMBERS", False) else plain for spec in specs]
    totals = [_total(_name(spec), rows[i :: len(specs)] + sections[i]) for i, spec in enumerate(specs)]
    return rows + [row for shown in (plain, near) if shown in sections for row in shown] + totals


def measured(group: Group, spec: Any) -> Row:
    """One coder on one group."""
    module, kind, name = slots.module_of(spec), _name(spec), f"{group.layout.part}.int{group.layout.bits}"
    with Stopwatch() as encoding:
        blob = module.encode(group, spec)
    with Stopwatch() as decoding:
        found = module.decode(blob, group.layout)
    if len(found) != len(group.codes) or not all(map(np.array_equal, found, group.codes)):
        raise ContractError(f"coder {kind!r} on {name}: other codes came back; do not use it, and report this")
    floor = sum(entropy(codes) * codes.size / 8 for codes in group.codes)
    ideal = module.ideal_bytes(group) if hasattr(module, "ideal_bytes") else None
    return Row(name, kind, group.layout.count, len(blob), floor, ideal, encoding.seconds, decoding.seconds)


def _default(kind: str) -> Any:
    return slots.technique(FOLDER, kind).Spec()


def _name(spec: Any) -> str:
    return slots.kind_of(spec) + (", rows reordered" if getattr(spec, "reorder", False) else "")


def _others(tensors: Tensors, groups: list[Group], neighbours: bool) -> list[Row]:
    """Scales and float16 numbers, as byte coders' files have them, or those of the coders by neighbours."""
    scales = [tensor.scales for group in groups for tensor in group.layout.tensors]
    plain = [value for value in tensors.values() if not isinstance(value, Quantized)]
    rows = []
    for name, arrays in (("scales", scales), ("float16", plain)):
        raw = numbers(arrays)
        with Stopwatch() as encoding:
            blob = squeeze(raw, pairs=True, neighbours=neighbours)
        with Stopwatch() as decoding:
            found = unsqueeze(blob, len(raw))
        if found != raw:
            raise ContractError(f"section {name}: other numbers came back; report this")
        pairs = np.unique(np.frombuffer(raw, dtype="<u2"), return_counts=True)[1]
        floor = float(-(pairs * np.log2(pairs / max(pairs.sum(), 1))).sum()) / 8
        rows.append(
            Row(
                name,
                NEAR if neighbours else PLAIN,
                len(raw) // 2,
                len(blob),
                floor,
                None,
                encoding.seconds,
                decoding.seconds,
            )
        )
    return rows


def _total(kind: str, mine: list[Row]) -> Row:
    models = [row.bytes if row.coder in (PLAIN, NEAR) else row.model_bytes for row in mine]
    return Row(
        "total",
        kind,
        sum(row.codes for row in mine),
        sum(row.bytes for row in mine),
        math.fsum(row.order0_bytes for row in mine),
        None if None in models else math.fsum(value for value in models if value is not None),
        math.fsum(row.encode_seconds for row in mine),
        math.fsum(row.decode_seconds for row in mine),
    )
