"""The header: what a file holds, as plain JSON, and every check that its numbers can be trusted with memory.

{"model": {...}, "vocab": 1024, "decoder": {...}, "tokenizer": "<sha256>", "coder": "brotli",
 "groups": [{"part": "q", "bits": 5, "tensors": [["blocks.0.attention.q.weight", 512, 512, 0], ...]}, ...],
 "float16": [["skip", [5, 512]], ...],
 "sections": [["codes.q", 1234, 567890], ...],          name, stored bytes, crc32; in the file's order
 "repair": [["embedding.weight", 4, 64], ...],          low-rank addends: tensor, rank, group; absent without any
 "forms": [["blocks.0.mlp.up.weight", 0, [0.1284, ...]], ...]}  tensor, rotation, levels (quant/forms.py); likewise
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fairway.base import slots, specs
from fairway.base.errors import ArtifactError, RecipeError
from fairway.model import GPT, ModelSpec, tags
from fairway.quant.grid import LEAST_BITS, MOST_BITS, Said

MOST_NUMBERS = 1 << 30  # a model of more parameters is refused: a file of a few bytes could claim any size
MOST_HEADER = 1 << 22  # bytes of JSON
MOST_TOKENIZER = 1 << 25  # bytes


@dataclass(frozen=True)
class GroupHeader:
    """The tensors of one part on one grid: name, rows, columns, layer."""

    part: str
    bits: int
    tensors: tuple[tuple[str, int, int, int | None], ...]

    @property
    def section(self) -> str:
        return f"codes.{self.part}.int{self.bits}"


@dataclass(frozen=True)
class Header:
    """See the module."""

    model: ModelSpec
    vocab: int
    decoder: dict[str, Any]
    tokenizer: str  # sha256 of the serialised tokenizer
    coder: str
    groups: tuple[GroupHeader, ...]
    float16: tuple[tuple[str, tuple[int, ...]], ...]
    sections: tuple[tuple[str, int, int], ...]
    repair: tuple[tuple[str, int, int], ...] = ()
    forms: tuple[Said, ...] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        matrices = {name: (rows, cols) for group in self.groups for name, rows, cols, _ in group.tensors}
        return {**matrices, **dict(self.float16)}


def to_json(header: Header) -> bytes:
    """Compact JSON; RecipeError for a decoder's table that JSON cannot hold."""
    try:
        table = specs.to_plain(header)
        for key in ("repair", "forms"):
            if not table[key]:
                del table[key]  # files of the first fairway have none: the same tensors keep their bytes
        if not header.model.apart:
            del table["model"]["apart"]  # nor has it that
        return json.dumps(table, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RecipeError(f"decoder: {error}; plain tables of finite numbers and strings are needed") from error


def from_json(content: bytes) -> Header:
    """The checked header. ValueError where it is not one, or where its sizes cannot be."""
    try:
        table = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(table, Mapping):
        raise ValueError("no JSON table")
    try:
        header = specs.build(Header, table)
    except RecipeError as error:
        raise ValueError(str(error)) from error
    _check_sizes(header)
    return header


def _check_sizes(header: Header) -> None:
    shapes = header.shapes()
    if len(shapes) != len(header.float16) + sum(len(group.tensors) for group in header.groups):
        raise ValueError("a tensor's name occurs twice")
    numbers = 0
    for name, shape in shapes.items():
        if any(side < 1 for side in shape) or len(shape) > 4:
            raise ValueError(f"{name}: shape {list(shape)} is impossible")
        numbers += math.prod(shape)
    if numbers > MOST_NUMBERS:
        raise ValueError(f"{numbers:,} numbers are more than a file may hold ({MOST_NUMBERS:,})")
    for group in header.groups:
        if not LEAST_BITS <= group.bits <= MOST_BITS or not group.tensors:
            raise ValueError(f"group {group.part!r}: {len(group.tensors)} tensors of {group.bits} bits are impossible")
    if header.repair:
        slots.optional("fairway.artifact.repair").check(header, shapes)
    names = [name for name, _, _ in header.sections]
    if len(set(names)) != len(names):
        raise ValueError("a section's name occurs twice")
    if any(stored < 0 for _, stored, _ in header.sections):
        raise ValueError("a section has a negative length")


def skeleton(spec: ModelSpec, vocab: int) -> GPT:
    """The model without memory for its weights (torch's meta device): names, shapes, tags."""
    with torch.device("meta"):
        return GPT(spec, vocab)


def check_shapes(spec: ModelSpec, vocab: int, shapes: Mapping[str, tuple[int, ...]]) -> GPT:
    """The model's skeleton, when the tensors are exactly its parameters; otherwise ArtifactError."""
    if spec.layers > len(shapes):
        raise ArtifactError(
            f"header: {spec.layers:,} layers, but {len(shapes)} tensors; the file is foreign or altered"
        )
    try:
        model = skeleton(spec, vocab)
        wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    except (RecipeError, RuntimeError, ArithmeticError, ValueError, TypeError, MemoryError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]  # torch adds where in its own code
        raise ArtifactError(f"header: its model cannot be built: {why}") from error
    for name in [*wanted, *shapes]:
        if wanted.get(name) != shapes.get(name):
            raise ArtifactError(
                f"tensor {name}: shape {_shown(shapes.get(name))} where the model has {_shown(wanted.get(name))}; "
                "the file is of another model or version"
            )
    return model


def parts(model: GPT) -> dict[str, tuple[str, int | None]]:
    """Part and layer of every parameter."""
    return {name: (tag.part, tag.layer) for name, tag in tags(model).items()}


def _shown(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
