"""A tiny model, its integers and a tokenizer, and the file that holds them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairway.artifact import PackSpec, Sealed, seal
from fairway.artifact.header import skeleton
from fairway.base.specs import build
from fairway.data.learning import train
from fairway.data.tokenizer import Tokenizer, TokenizerSpec
from fairway.model import ModelSpec, tags
from fairway.quant import Quantized, Tensors

DECODER: dict[str, Any] = {"score": {"stride": 64, "temperature": 1.0, "name": "sliding"}}


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_tokenizer() -> Tokenizer:
    text = [f"the file number {i} holds a line of text, and {i * 7} more of them\n".encode() for i in range(200)]
    return Tokenizer(train(text, TokenizerSpec(vocab=300)))


def tiny_spec() -> ModelSpec:
    return build(
        ModelSpec,
        {
            "width": 8,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "hidden": 12,
            "context": 16,
            "rotary": {"dims": 2},
            "embed": ({"kind": "bigram_hash", "rows": 16, "width": 4}, "smear"),
        },
    )


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return tiny_spec()


def integers(spec: ModelSpec, vocab: int, seed: int = 0) -> Tensors:
    """Random integers of several widths for every matrix and table of a model, random float16 for the rest."""
    chance = np.random.default_rng(seed)
    model, tensors = skeleton(spec, vocab), {}
    for name, tag in tags(model).items():
        shape = tuple(model.get_parameter(name).shape)
        if tag.role in ("matrix", "table"):
            bits = {"embedding": 8, "q": 2, "v": 4 + (tag.layer or 0), "up": 6}.get(tag.part, 5)
            limit = 2 ** (bits - 1) - 1
            codes = np.clip(np.round(chance.normal(0, limit / 3, shape)), -limit, limit).astype(np.int8)
            scales = chance.uniform(0.001, 0.1, shape[0]).astype(np.float16)
            tensors[name] = Quantized(codes, scales, bits)
        else:
            tensors[name] = chance.normal(1, 0.1, shape).astype(np.float16)
    return tensors


@pytest.fixture(scope="session")
def tensors(spec: ModelSpec, tokenizer: Tokenizer) -> Tensors:
    return integers(spec, tokenizer.size)


@pytest.fixture
def sealed(tmp_path: Path, tensors: Tensors, spec: ModelSpec, tokenizer: Tokenizer) -> Callable[..., Sealed]:
    def make(coder: Any = "plain", **changes: Any) -> Sealed:
        values = {"tensors": tensors, "model": spec, "vocab": tokenizer.size, "tokenizer": tokenizer}
        values |= {"decoder": DECODER, "spec": build(PackSpec, {"coder": coder})}
        return seal(path=tmp_path / "model.fw", **{**values, **changes})

    return make


def same(first: Tensors, second: Tensors) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    if list(first) != list(second):
        return False
    for name, value in first.items():
        other = second[name]
        if isinstance(value, Quantized):
            if not isinstance(other, Quantized) or value.bits != other.bits:
                return False
            if not np.array_equal(value.codes, other.codes) or not np.array_equal(value.scales, other.scales):
                return False
        elif isinstance(other, Quantized) or other.dtype != value.dtype or not np.array_equal(value, other):
            return False
    return True
