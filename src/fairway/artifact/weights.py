"""Float weights as safetensors, opened by the same reader as an artifact: the stage `float` is scored from a file too.

Metadata `fairway` is JSON: model, vocab, decoder, and the sha256 of tokenizer and tensors. The tokenizer is a tensor of
bytes named `tokenizer.model`. Tensors are the model's parameters, float32.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairway.artifact.header import check_shapes
from fairway.artifact.opened import Artifact, Sealed
from fairway.base import files, specs
from fairway.base.errors import ArtifactError, FairwayError, RecipeError
from fairway.data.tokenizer import Tokenizer
from fairway.model import GPT, ModelSpec

TOKENIZER = "tokenizer.model"
REMEDY = "fetch or write it again"


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether float weights are opened: where they are trained."""
    return "train" in recipe


def write_weights(path: Path, model: GPT, tokenizer: Tokenizer, decoder: dict[str, Any]) -> Sealed:
    """The model's parameters as float32, its spec, the tokenizer and the decoder's tables, in one .safetensors file."""
    from safetensors.numpy import save

    if path.suffix != ".safetensors":
        raise RecipeError(f"{path}: float weights are a .safetensors file; name it so")
    tensors: dict[str, NDArray[Any]] = {
        name: parameter.detach().float().contiguous().cpu().numpy() for name, parameter in model.named_parameters()
    }
    about = {
        "model": specs.to_plain(model.spec),
        "vocab": model.vocab,
        "decoder": decoder,
        "tokenizer": tokenizer.sha256,
        "tensors": _digest(tensors),
    }
    tensors[TOKENIZER] = np.frombuffer(tokenizer.model, dtype=np.uint8)
    content = save(tensors, metadata={"fairway": json.dumps(about, allow_nan=False)})
    files.write(path, content)
    sections = {name: value.nbytes for name, value in tensors.items()}
    sections = {"header": len(content) - sum(sections.values()), **sections}
    return Sealed(path, len(content), hashlib.sha256(content).hexdigest(), sections)


def open_weights(path: Path, content: bytes) -> Artifact:
    """content: the file's bytes. Raises ArtifactError naming what is damaged or missing."""
    tensors, metadata = _parsed(path, content)
    try:
        about = json.loads(metadata["fairway"])
        spec = specs.build(ModelSpec, about["model"])
        vocab, decoder, expected = int(about["vocab"]), dict(about["decoder"]), str(about["tensors"])
        wanted = str(about["tokenizer"])
        raw = tensors.pop(TOKENIZER).tobytes()
    except (KeyError, TypeError, ValueError, RecursionError, RecipeError) as error:
        raise ArtifactError(f"{path}: section header: not fairway's weights: {error}; {REMEDY}") from error
    try:
        check_shapes(spec, vocab, {name: tuple(value.shape) for name, value in tensors.items()})
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if _digest(tensors) != expected or any(value.dtype != np.float32 for value in tensors.values()):
        raise ArtifactError(f"{path}: section tensors: altered since they were written; {REMEDY}")
    if hashlib.sha256(raw).hexdigest() != wanted:
        raise ArtifactError(f"{path}: section tokenizer: not the one that the header names; {REMEDY}")
    try:
        tokenizer = Tokenizer.from_bytes(raw)
    except (FairwayError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{path}: section tokenizer: {error}; {REMEDY}") from error
    digest = hashlib.sha256(content).hexdigest()
    return Artifact(path, spec, vocab, tokenizer, decoder, dict(tensors), digest, len(content))


def _parsed(path: Path, content: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]) if 8 + length <= len(content) else {}
        return load(content), dict(header.get("__metadata__", {}))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise ArtifactError(f"{path}: section header: {str(error) or 'no safetensors'}; {REMEDY}") from error


def _digest(tensors: dict[str, NDArray[Any]]) -> str:
    """One sha256 over names, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
