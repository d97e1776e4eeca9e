"""A small model with a bit of everything, its weights moved off their initial values."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fairway.model import GPT, ModelSpec, RotarySpec, ValueEmbeddingSpec, build_model

VOCAB = 64


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Matrices this small lose more to a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(seed: int = 0, **changes: object) -> GPT:
    values: dict[str, object] = {
        "width": 32,
        "layers": 3,
        "heads": 4,
        "kv_heads": 2,
        "hidden": 48,
        "context": 16,
        "rotary": RotarySpec(dims=4),
        "value_embedding": ValueEmbeddingSpec(8, (2,)),
    }
    model = build_model(ModelSpec(**{**values, **changes}), VOCAB, seed)  # type: ignore[arg-type]
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance))
    return model


@pytest.fixture
def model() -> GPT:
    return small_model()


@pytest.fixture
def batches() -> Callable[..., list[Tensor]]:
    def make(count: int = 3, size: int = 4, seed: int = 0) -> list[Tensor]:
        chance = torch.Generator().manual_seed(seed)
        return [torch.randint(0, VOCAB, (size, 16), generator=chance) for _ in range(count)]

    return make
