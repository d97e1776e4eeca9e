"""The file: magic and version, header, coded tensors, tokenizer, checksum. Nothing in it is executed.

    7 bytes  "FAIRWAY"      1 byte  version
    4 bytes  stored length of the header, 4 bytes its crc32 (little-endian)
    header   squeezed JSON (header.py)
    sections codes of each group · scales · float16 · repair, where there is any · tokenizer, as the header lists them
    32 bytes sha256 of everything before it

Tensors of one part on one grid form a group, coded as one. The crc32s say which section is damaged, the sha256 that
none is. Bits are API: a changed byte is a new version, with a golden file in tests/golden.
"""

import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fairway.artifact.groups import Codes, Group, GroupLayout, TensorLayout
from fairway.artifact.header import (
    MOST_HEADER,
    MOST_TOKENIZER,
    GroupHeader,
    Header,
    check_shapes,
    from_json,
    parts,
    to_json,
)
from fairway.artifact.opened import Artifact, Sealed
from fairway.artifact.squeeze import squeeze, unsqueeze
from fairway.base import files, slots
from fairway.base.errors import ArtifactError, ContractError, FairwayError, RecipeError
from fairway.base.specs import choice
from fairway.data.tokenizer import Tokenizer
from fairway.model import GPT, ModelSpec
from fairway.quant.grid import Passthrough, Quantized, Tensors, has

MAGIC, VERSION = b"FAIRWAY", 1
PRELUDE = len(MAGIC) + 1 + 4 + 4
DIGEST = 32
MOST_FILE = 1 << 32  # bytes read into memory
REMEDY = "fetch or write it again"


@dataclass(frozen=True)
class PackSpec:
    """How integers become bytes."""

    coder: Any = choice("fairway.artifact.coder", "brotli")


def seal(
    path: Path,
    tensors: Tensors,
    model: ModelSpec,
    vocab: int,
    tokenizer: Tokenizer,
    decoder: dict[str, Any],
    spec: PackSpec,
) -> Sealed:
    """Writes the file, whole or not at all.

    tensors: integers and float16, by the model's parameter names; decoder: plain tables that scoring needs (JSON).
    ContractError where the tensors are not the model's.
    """
    try:
        skeleton = check_shapes(model, vocab, {name: tuple(value.shape) for name, value in tensors.items()})
    except ArtifactError as error:
        raise ContractError(f"seal: {error}") from error
    groups = list(grouped(tensors, skeleton))
    plain = {name: value for name, value in tensors.items() if not isinstance(value, Quantized)}
    if any(value.dtype != np.float16 for value in plain.values()):
        raise ContractError("seal: an unquantised tensor is not float16")
    module = slots.module_of(spec.coder)
    with ThreadPoolExecutor() as pool:
        coded = list(pool.map(lambda group: module.encode(group, spec.coder), groups))
    listed = tuple(_group_header(group.layout) for group in groups)
    sections = {header.section: blob for header, blob in zip(listed, coded, strict=True)}
    near = bool(getattr(module, "CODES_NUMBERS", False))
    scales = numbers([t.scales for group in groups for t in group.layout.tensors])
    sections["scales"] = squeeze(scales, pairs=True, neighbours=near)
    sections["float16"] = squeeze(numbers(list(plain.values())), pairs=True, neighbours=near)
    mended: tuple[tuple[str, int, int], ...] = ()
    if has(tensors, "repair"):
        repair = slots.optional("fairway.artifact.repair")
        mended, sections["repair"] = repair.listed(tensors), repair.encode(tensors)
    forms = slots.optional("fairway.quant.forms").listed(tensors) if has(tensors, "form") else ()
    sections["tokenizer"] = squeeze(tokenizer.model)
    header = Header(
        model=model,
        vocab=vocab,
        decoder=decoder,
        tokenizer=tokenizer.sha256,
        coder=slots.kind_of(spec.coder),
        groups=listed,
        float16=tuple((name, tuple(value.shape)) for name, value in plain.items()),
        sections=tuple((name, len(blob), zlib.crc32(blob)) for name, blob in sections.items()),
        repair=mended,
        forms=forms,
    )
    return _written(path, squeeze(to_json(header)), sections)


def open_artifact(path: Path | str) -> Artifact:
    """The file's content, every byte of it checked. Opens `seal`'s files and `write_weights`'.

    Raises ArtifactError naming the damaged section of a file that is cut short, altered, foreign or of a later version.
    """
    path = Path(path)
    content = _read(path)
    if content[: len(MAGIC)] != MAGIC:
        if path.suffix == ".safetensors":
            opened: Artifact = slots.optional("fairway.artifact.weights").open_weights(path, content)
            return opened
        _fail(path, "magic", "this is no fairway artifact; name a file written by `fairway run` or `fairway pack`")
    header, blobs, start = _sections(path, content)
    skeleton = _located(path, check_shapes, header.model, header.vocab, header.shapes())
    known = parts(skeleton)
    tokenizer = _tokenizer(path, header, blobs["tokenizer"])
    scales = _scales(path, header, blobs["scales"])
    tensors: Tensors = {}
    for group in header.groups:
        if any(known[name] != (group.part, layer) for name, _, _, layer in group.tensors):
            _fail(path, "header", f"group {group.part!r} holds tensors of other parts; the file is foreign or altered")
        tensors |= _decoded(path, header, group, blobs[group.section], scales)
    if header.forms:
        forms = _located(path, lambda: slots.optional("fairway.quant.forms"), section="header")
        tensors |= _located(path, forms.applied, header.forms, tensors, section="header")
    if header.repair:
        repair = _located(path, lambda: slots.optional("fairway.artifact.repair"), section="repair")
        tensors |= _located(path, repair.decode, blobs["repair"], header.repair, tensors, section="repair")
    tensors |= _float16(path, header, blobs["float16"])
    return Artifact(
        path=path,
        model_spec=header.model,
        vocab=header.vocab,
        tokenizer=tokenizer,
        decoder=header.decoder,
        tensors={name: tensors[name] for name, _ in skeleton.named_parameters()},
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        sections=_weighed(start, {name: len(blob) for name, blob in blobs.items()}),
    )


def grouped(tensors: Tensors, skeleton: GPT) -> Iterator[Group]:
    """Groups by part and bits, in the model's order."""
    found: dict[tuple[str, int], list[tuple[TensorLayout, Codes]]] = {}
    for name, (part, layer) in parts(skeleton).items():
        value = tensors[name]
        if isinstance(value, Quantized):
            layout = TensorLayout(name, *value.shape, layer, value.scales)
            found.setdefault((part, value.bits), []).append((layout, value.codes))
    for (part, bits), members in found.items():
        layouts, codes = zip(*members, strict=True)
        yield Group(GroupLayout(part, bits, layouts), codes)


def _group_header(layout: GroupLayout) -> GroupHeader:
    return GroupHeader(layout.part, layout.bits, tuple((t.name, t.rows, t.cols, t.layer) for t in layout.tensors))


def numbers(arrays: list[Any]) -> bytes:
    """Float16 numbers, little-endian, one array after another."""
    return b"".join(np.ascontiguousarray(array, dtype="<f2").tobytes() for array in arrays)


def _written(path: Path, header: bytes, sections: dict[str, bytes]) -> Sealed:
    digest = hashlib.sha256()
    prelude = MAGIC + bytes([VERSION]) + len(header).to_bytes(4, "little") + zlib.crc32(header).to_bytes(4, "little")
    pieces = [prelude, header, *sections.values()]
    for piece in pieces:
        digest.update(piece)
    content = b"".join([*pieces, digest.digest()])
    files.write(path, content)
    weighed = _weighed(PRELUDE + len(header), {name: len(blob) for name, blob in sections.items()})
    return Sealed(path, len(content), hashlib.sha256(content).hexdigest(), weighed)


def _weighed(header: int, sections: dict[str, int]) -> dict[str, int]:
    return {"header": header, **sections, "checksum": DIGEST}


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MOST_FILE:
            _fail(path, "file", f"{size:,} bytes are more than an artifact may have ({MOST_FILE:,})")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}; name an artifact that can be read") from error


def _sections(path: Path, content: bytes) -> tuple[Header, dict[str, bytes], int]:
    """The checked header, the sections' bytes, and where the first section starts."""
    if len(content) < PRELUDE + DIGEST:
        _fail(path, "prelude", f"cut short after {len(content)} bytes; {REMEDY}")
    version = content[len(MAGIC)]
    if version != VERSION:
        _fail(path, "version", f"format {version}, this fairway reads format {VERSION}; use the fairway that wrote it")
    length = int.from_bytes(content[PRELUDE - 8 : PRELUDE - 4], "little")
    start = PRELUDE + length
    if start + DIGEST > len(content):
        _fail(path, "header", f"{length:,} bytes announced, {len(content) - PRELUDE:,} there; {REMEDY}")
    blob = content[PRELUDE:start]
    if zlib.crc32(blob) != int.from_bytes(content[PRELUDE - 4 : PRELUDE], "little"):
        _fail(path, "header", f"damaged; {REMEDY}")
    try:
        header = from_json(unsqueeze(blob, MOST_HEADER))
    except ValueError as error:
        _fail(path, "header", f"{error}; {REMEDY}")
    whole = start + sum(stored for _, stored, _ in header.sections) + DIGEST
    if whole != len(content):
        word = "cut short" if whole > len(content) else "too long"
        _fail(path, "sections", f"{word}: {len(content):,} bytes, {whole:,} expected; {REMEDY}")
    blobs = _cut(path, content, header, start)
    if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
        _fail(path, "checksum", f"the file was altered; {REMEDY}")
    wanted = {group.section for group in header.groups} | {"scales", "float16", "tokenizer"}
    wanted |= {"repair"} if header.repair else set()
    if wanted != set(blobs) or len(header.groups) + 3 + bool(header.repair) != len(blobs):
        _fail(path, "header", "its sections are not those of its tensors; the file is foreign or altered")
    return header, blobs, start


def _cut(path: Path, content: bytes, header: Header, start: int) -> dict[str, bytes]:
    blobs = {}
    for name, stored, crc in header.sections:
        blobs[name] = content[start : start + stored]
        if zlib.crc32(blobs[name]) != crc:
            _fail(path, name, f"damaged; {REMEDY}")
        start += stored
    return blobs


def _tokenizer(path: Path, header: Header, blob: bytes) -> Tokenizer:
    raw = _located(path, unsqueeze, blob, MOST_TOKENIZER, section="tokenizer")
    if hashlib.sha256(raw).hexdigest() != header.tokenizer:
        _fail(path, "tokenizer", "it is not the one that the header names; the file is foreign or altered")
    tokenizer = _located(path, Tokenizer.from_bytes, raw, section="tokenizer")
    if tokenizer.size != header.vocab:
        _fail(path, "tokenizer", f"{tokenizer.size:,} pieces, but the model has {header.vocab:,} tokens")
    return tokenizer


def _scales(path: Path, header: Header, blob: bytes) -> dict[str, Passthrough]:
    rows = [(name, (count,)) for group in header.groups for name, count, _, _ in group.tensors]
    return _arrays(path, "scales", blob, rows)


def _float16(path: Path, header: Header, blob: bytes) -> dict[str, Passthrough]:
    found = _arrays(path, "float16", blob, list(header.float16))
    if not all(bool(np.isfinite(value).all()) for value in found.values()):
        _fail(path, "float16", "a number is not finite; the file is foreign or altered")
    return found


def _arrays(path: Path, section: str, blob: bytes, shapes: list[tuple[str, Any]]) -> dict[str, Passthrough]:
    counts = [int(np.prod(shape, dtype=np.int64)) for _, shape in shapes]
    raw = _located(path, unsqueeze, blob, 2 * sum(counts), section=section)
    if len(raw) != 2 * sum(counts):
        _fail(path, section, f"{len(raw):,} bytes, {2 * sum(counts):,} expected; {REMEDY}")
    numbers, start = np.frombuffer(raw, dtype="<f2"), 0
    found: dict[str, Passthrough] = {}
    for (name, shape), count in zip(shapes, counts, strict=True):
        found[name] = numbers[start : start + count].reshape(shape).astype(np.float16)
        start += count
    return found


def _decoded(path: Path, header: Header, group: GroupHeader, blob: bytes, scales: dict[str, Any]) -> Tensors:
    layouts = tuple(TensorLayout(name, rows, cols, layer, scales[name]) for name, rows, cols, layer in group.tensors)
    layout = GroupLayout(group.part, group.bits, layouts)
    module = _located(path, slots.technique, "fairway.artifact.coder", header.coder, section="coder")
    codes = _located(path, module.decode, blob, layout, section=group.section)
    return {
        tensor.name: _located(path, Quantized, piece, tensor.scales, group.bits, section=group.section)
        for tensor, piece in zip(layouts, codes, strict=True)
    }


def _located(path: Path, call: Any, *arguments: Any, section: str = "") -> Any:
    """`call`, its complaints about the content turned into an ArtifactError that names the section."""
    try:
        return call(*arguments)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except (FairwayError, RecipeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path}: section {section}: {error}; {REMEDY}") from error


def _fail(path: Path, section: str, text: str) -> NoReturn:
    raise ArtifactError(f"{path}: section {section}: {text}")
